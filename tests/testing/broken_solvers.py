"""Conjugate gradients with one defect each, most after published code."""

import torch

from imaml_solvers import CG, LinearSolver, Solution, Status


class Textbook(LinearSolver):
    """Correct; subclasses break one thing."""

    steps = 100
    stops = True
    step_scale = residual_scale = 1.0

    def _solve(self, op, b, x0, preconditioner):
        x, r, p = torch.zeros_like(b), b.clone(), b.clone()
        rho = (r * r).sum(-1, keepdim=True)
        status = torch.full(b.shape[:-1], Status.MAX_STEPS).masked_fill(~torch.isfinite(b).all(-1), Status.NONFINITE)
        num_steps = torch.zeros_like(status)
        for _ in range(self.budget(b)):
            met = self.stops & (r.norm(dim=-1) <= 1e-8 * b.norm(dim=-1))
            status[met & (status == Status.MAX_STEPS)] = Status.CONVERGED
            q = op.mv(p)
            curvature = (p * q).sum(-1, keepdim=True)
            status[(status == Status.MAX_STEPS) & ~torch.isfinite(curvature).squeeze(-1)] = Status.NONFINITE
            status[(status == Status.MAX_STEPS) & self.breaks(curvature, p)] = Status.BREAKDOWN
            running = (status == Status.MAX_STEPS).unsqueeze(-1)
            if not running.any():
                break
            alpha = self.step(rho, curvature)
            x = torch.where(running, x + self.step_scale * alpha * p, x)
            new = torch.where(running, r - self.residual_scale * alpha * q, r)
            new_rho = (new * new).sum(-1, keepdim=True)
            p = torch.where(running, self.direction(r, new) + new_rho / rho * p, p)
            r, rho = new, torch.where(running, new_rho, rho)
            num_steps += running.squeeze(-1)
        residual = (b - op.mv(x)).norm(dim=-1)
        return Solution(x, self.verdict(status), num_steps, residual)

    def budget(self, b):
        return self.steps

    def step(self, rho, curvature):
        return rho / curvature

    def breaks(self, curvature, p):
        return (curvature <= 1e-14 * (p * p).sum(-1, keepdim=True)).squeeze(-1)

    def direction(self, old, new):
        return new

    def verdict(self, status):
        return status


class CurvatureScaledInTheStepOnly(Textbook):
    """Twice the curvature in the residual that the recursion carries, not in the step."""

    residual_scale = 2.0


class DirectionFromTheOldResidual(Textbook):
    def direction(self, old, new):
        return old


class StaleIterate(LinearSolver):
    """Returns the iterate before the last; zero for A = I."""

    def _solve(self, op, b, x0, preconditioner):
        solution = CG(rtol=1e-8).solve(op, b)
        for i in range(solution.status.numel()):
            steps = int(solution.num_steps.flatten()[i])
            before = CG(max_steps=steps - 1).solve(op, b).x if steps > 1 else torch.zeros_like(b)
            solution.x.view(-1, b.shape[-1])[i] = before.view(-1, b.shape[-1])[i]
        return solution


class NoStepForSizeOne(Textbook):
    """A budget of n - 1 steps, none for n = 1."""

    def budget(self, b):
        return b.shape[-1] - 1


class NaNAfterConvergence(Textbook):
    """Iterates for the whole budget: 0 / 0 once the residual is exactly zero."""

    stops = False

    def breaks(self, curvature, p):
        return torch.zeros_like(curvature.squeeze(-1), dtype=torch.bool)


class StepsOverNegativeCurvature(Textbook):
    """Takes the curvature for positive, and a spent budget for success."""

    def step(self, rho, curvature):
        return rho / curvature.abs()

    def breaks(self, curvature, p):
        return torch.zeros_like(curvature.squeeze(-1), dtype=torch.bool)

    def verdict(self, status):
        return status.masked_fill(status == Status.MAX_STEPS, Status.BUDGET_SPENT)


class AlwaysConverged(LinearSolver):
    def _solve(self, op, b, x0, preconditioner):
        solution = CG(max_steps=20).solve(op, b)
        return Solution(
            solution.x, torch.zeros_like(solution.status), solution.num_steps, torch.zeros_like(solution.residual_norm)
        )


class AbsoluteTolerance(LinearSolver):
    def _solve(self, op, b, x0, preconditioner):
        return CG(rtol=0.0, atol=1e-8).solve(op, b)


class OneSystemForTheBatch(LinearSolver):
    """Stops all systems with the first."""

    def _solve(self, op, b, x0, preconditioner):
        steps = CG(rtol=1e-8).solve(op, b).num_steps.min()
        return CG(max_steps=max(int(steps), 1)).solve(op, b)


class RaisesOnNumerics(LinearSolver):
    def _solve(self, op, b, x0, preconditioner):
        solution = CG(rtol=1e-8).solve(op, b)
        if not solution.success.all():
            raise ArithmeticError("no convergence")
        return solution


class OverwritesTheRightHandSide(LinearSolver):
    def _solve(self, op, b, x0, preconditioner):
        solution = CG(rtol=1e-8).solve(op, b)
        b.copy_(solution.x)
        return solution


class Prints(LinearSolver):
    def _solve(self, op, b, x0, preconditioner):
        print("solving")
        return CG(rtol=1e-8).solve(op, b)


class AlwaysDouble(LinearSolver):
    def _solve(self, op, b, x0, preconditioner):
        solution = CG(rtol=1e-8).solve(op, b)
        return Solution(solution.x.double(), solution.status, solution.num_steps, solution.residual_norm)


class IgnoresItsStart(LinearSolver):
    _uses_x0 = True

    def _solve(self, op, b, x0, preconditioner):
        return CG(rtol=1e-8).solve(op, b)


class SolvesThePreconditionedSystem(LinearSolver):
    """Returns y of M A y = b."""

    _uses_preconditioner = True

    def _solve(self, op, b, x0, preconditioner):
        if preconditioner is None:
            return CG(rtol=1e-8).solve(op, b)
        return CG(rtol=1e-8).solve(lambda x: preconditioner.mv(op.mv(x)), b)


class SmallResidualIsReported(LinearSolver):
    def _solve(self, op, b, x0, preconditioner):
        solution = CG(rtol=1e-8).solve(op, b)
        return Solution(solution.x, solution.status, solution.num_steps, solution.residual_norm + b.norm(dim=-1))
