"""What the activations of a model do to the signal and to the gradient: `fastact.monitor`, its report and its figures."""

from fastact.sight.images import gradient_images
from fastact.sight.monitor import Watch, monitor
from fastact.sight.report import Report

__all__ = ["Report", "Watch", "gradient_images", "monitor"]
