//! Figures 1 and 1b: what 8 and 30 candle processes with one model hold.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod bert;
mod fleet;

use carlsbad_kit::capability::Capability;
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::interleave;
use carlsbad_kit::scratch;
use fleet::Fleet;
use tetris_store::candle::MapAlloc;
use tetris_store::{Store, StoreConfig};

#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

fn main() {
    if fleet::role() {
        return;
    }
    for (id, processes) in [("tetris-store/1", 8), ("tetris-store/1b", 30)] {
        let what =
            format!("{processes} candle processes, one model, every weight touched: sum of PSS");
        let figure = Figure::new(id, what, "MiB");
        if !Capability::Data.is_present() {
            figure.without(Capability::Data).emit().unwrap();
            continue;
        }
        let directory = scratch::on_tmpfs().unwrap();
        let store = Store::open(StoreConfig::at(directory.path().join("store"))).unwrap();
        let model = bert::ingest(&store);
        let (processes, rounds) = if is_quick() { (2, 1) } else { (processes, 3) };
        let samples = interleave(
            0,
            rounds,
            || Fleet::sharing(processes, &store, &model).memory_mib(),
            || Fleet::copying(processes).memory_mib(),
        );
        figure
            .against("candle's MmapedSafetensors", samples)
            .note("MiniLM-L6, 90.9 MB; ours with the stored bytes that no process maps")
            .emit()
            .unwrap();
    }
}
