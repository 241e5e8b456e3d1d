"""The half of patcher that lives inside vLLM: plugin, routes, store, workers."""
