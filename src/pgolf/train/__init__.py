"""Training under the clock: what trainers import beside torch. It costs an artifact no bytes."""
