"""How the slots of a transformation are stored: in fewer bytes than float32."""
