"""Derivatives of those losses: gradients and products, exact, compiled, by finite differences or Gauss-Newton."""
