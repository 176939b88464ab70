#pragma once

/// Whether lomem's op gives what torch's gives.
bool works();
