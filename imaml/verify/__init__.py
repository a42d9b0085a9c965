"""Verification: is this Hessian-vector product, or this meta-gradient, right?"""

from imaml.verify._hvp import hvp as hvp
from imaml.verify._meta_gradient import meta_gradient as meta_gradient
from imaml.verify._verification import Verification as Verification
