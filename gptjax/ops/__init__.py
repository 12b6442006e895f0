"""The operations that the model is made of, each for every kind of device."""
