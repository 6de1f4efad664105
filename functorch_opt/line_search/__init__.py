"""Line searches, and L-BFGS, the optimizer that is built on them."""
