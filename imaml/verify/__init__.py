"""Verification: is this Hessian-vector product, or this meta-gradient, right, and is it meaningful?"""

from imaml.verify._hvp import hvp as hvp
from imaml.verify._meta_gradient import meta_gradient as meta_gradient
from imaml.verify._smoothness import Smoothness as Smoothness
from imaml.verify._smoothness import smoothness as smoothness
from imaml.verify._verification import Verification as Verification
