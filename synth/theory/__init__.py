"""The toy model of learning by deduction: simulated, in closed form, and fitted."""
