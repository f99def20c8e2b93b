"""`python -m ffebm_compiler` is the command `ffebm`."""

from ffebm_compiler.cli.main import main

if __name__ == "__main__":
    main(prog_name="ffebm")
