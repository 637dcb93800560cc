"""What a plan costs: FLOPs and KV bytes of every layer, and named geometries."""
