"""The same model, faster: what replaces parts of the reference, each proved equal to it.

To be read in this order: engine, the whole; block, stacked, sequential, parallel, a layer; products, its linear layers
with their adapters; elementwise and kernels, what stands between them; head, both ends; plan and offload, what waits
where; nf4 and movers, weights of four bits; families, which models; proof. The rest serves mixtures of experts
(mixture, router, experts, grouped, expert_kernels) and products in eight bits (eight and eight_*).
"""
