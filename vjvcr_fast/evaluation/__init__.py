"""Measures one trained run.

evaluate        all numbers of Table 1, written to evaluation.json
probes          the speed probes (Table 1)
latent_probes   the probes of z*: direction and digit (Table 2), actions (figure 2)
metrics         PSNR, RankMe, mAP
embed           writes the representations of any videos to a file
"""
