//! The stops of the tour, one module a crate.

mod directcxl;
mod krcore;
mod rund_rt;
mod tetris_store;

use anyhow::Result;

use crate::stop::Stop;

/// All of them, in the order of the tour.
pub(crate) const STOPS: &[Stop] = &[
    Stop {
        name: "tetris-store",
        job: "One copy of every tensor on the machine, whoever loads it.",
        run: tetris_store::visit,
    },
    Stop {
        name: "directcxl",
        job: "CXL memory as named, mappable, crash-safe namespaces.",
        run: directcxl::visit,
    },
    Stop {
        name: "rund-rt",
        job: "Hundreds of secure sandboxes a second, thousands on a machine.",
        run: rund_rt::visit,
    },
    Stop {
        name: "krcore",
        job: "Microsecond RDMA connections from a shared, checked pool.",
        run: krcore::visit,
    },
];

/// Plays the role that this process was started in, if it was.
pub(crate) fn play_role() -> Option<Result<()>> {
    tetris_store::worker::play()
        .or_else(directcxl::worker::play)
        .or_else(krcore::worker::play)
}
