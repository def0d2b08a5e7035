"""Weighted k-means and its relatives, for one set of points or many at once.

Lloyd's iterations (1957) from k-means++ (Arthur and Vassilvitskii 2007). An error is
`sum_j weight_j * (point_j - centroid_j)^2`; weights are one number a point, or one a coordinate
(a diagonal Hessian, or zeros over padding).

Reproducible: sums over points run in float64 and in the order of the points (numpy.bincount), and
matrix products run on one thread each, so the number of threads changes nothing but the time.
"""

from __future__ import annotations

from vqkernels.quantize.kmeans.clustering import KMeans, cluster, kmeans
from vqkernels.quantize.kmeans.coding import assign, point_errors

__all__ = ["KMeans", "assign", "cluster", "kmeans", "point_errors"]
