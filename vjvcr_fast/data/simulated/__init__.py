"""3D scenes made with a physics engine, written in the formats of CLEVRER and CATER."""
