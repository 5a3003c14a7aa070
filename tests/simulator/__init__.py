SOURCE = "7b0a1c3e-1f2d-4a5b-8c6d-7e8f90a1b2c3"
