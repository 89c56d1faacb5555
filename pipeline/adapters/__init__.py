"""Adapters, by their names under `adapters`, or by adapters.<name>.architecture.kind."""

ADAPTERS = {
    "linear": "pipeline.adapters.linear:Linear",
    "mlp": "pipeline.adapters.mlp:MLP",
    "self_attention": "pipeline.adapters.self_attention:SelfAttention",
    "query": "pipeline.adapters.query:Query",
}
