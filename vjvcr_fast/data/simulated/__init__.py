"""3D scenes from a physics engine, written in the formats of CLEVRER and CATER."""
