"""regrow changes the shape of trained networks, exactly."""
