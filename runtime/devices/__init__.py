"""What a crossbar makes of a block: devices that err, drift and are read with noise, converters, and pulsed updates."""
