"""Line searches, and the optimizer that lives on them."""
