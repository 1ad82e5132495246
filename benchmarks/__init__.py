"""What is fast is measured here, each figure beside a peer in the same run; `results/` keeps what was found.

`command` is `ringworld bench`. Not shipped: a checkout has it.
"""
