// The teams of OpenMP threads in this process. A thread that opens parallel regions has a team of its own, and keeps it
// until it ends or releases it. Where there are more threads in teams than cores, libgomp's threads no longer spin at
// barriers but sleep, and a decode step takes twice to three times as long: one thread should compute at a time.
#pragma once

namespace latentkv {

// Whether a region is to fork: `worth` it, on more than one thread. The calling thread then counts as having a team.
bool forks(bool worth);

// Threads that have a team, as far as kernels of this module made them.
int live_teams();

// Ends the calling thread's team; its next region makes another one, which takes some microseconds a thread.
void release_team();

}  // namespace latentkv
