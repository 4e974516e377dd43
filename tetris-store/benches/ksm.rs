//! Figures 7 and 7b: the same processes with kernel samepage merging, after it has found all.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod bert;
mod fleet;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::Interleaved;
use carlsbad_kit::scratch;
use fleet::Fleet;
use tetris_store::candle::MapAlloc;
use tetris_store::{Store, StoreConfig};

#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

/// How long the kernel may take to find everything.
const PATIENCE: Duration = Duration::from_secs(300);

/// The kernel's settings, put back at the end.
struct Ksm {
    before: Vec<(&'static str, String)>,
}

impl Ksm {
    const SETTINGS: [&str; 3] = ["run", "pages_to_scan", "sleep_millisecs"];

    fn get(name: &str) -> u64 {
        let text = fs::read_to_string(Path::new("/sys/kernel/mm/ksm").join(name)).unwrap();
        text.trim().parse().unwrap()
    }

    fn set(name: &str, value: &str) {
        fs::write(Path::new("/sys/kernel/mm/ksm").join(name), value).unwrap();
    }

    /// Scanning as fast as it can.
    fn start() -> Self {
        let before = (Self::SETTINGS.into_iter())
            .map(|name| (name, Self::get(name).to_string()))
            .collect();
        Self::set("pages_to_scan", "20000");
        Self::set("sleep_millisecs", "1");
        Self::set("run", "1");
        Self { before }
    }

    /// Waits until three scans of everything have found nothing new.
    fn settle() {
        let start = Instant::now();
        let (mut scans, mut sharing, mut quiet) = (Self::get("full_scans"), 0, 0);
        while quiet < 3 && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(100));
            let now = Self::get("full_scans");
            if now > scans {
                let found = Self::get("pages_sharing");
                quiet = if found == sharing && found > 0 {
                    quiet + 1
                } else {
                    0
                };
                (scans, sharing) = (now, found);
            }
        }
        assert!(quiet == 3, "KSM still finds pages after {PATIENCE:?}");
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (name, value) in &self.before {
            Self::set(name, value);
        }
    }
}

/// CPU time of a process since it began, in milliseconds.
fn cpu_ms(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e6
}

/// The kernel thread that scans.
fn ksmd() -> u32 {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        entry
            .unwrap()
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
    });
    let named = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "ksmd")
    };
    pids.into_iter().find(named).unwrap()
}

/// Memory of the fleet, and the CPU time that was spent while it served nothing.
fn idle(fleet: &Fleet, wait: impl FnOnce()) -> (f64, f64) {
    let ksmd = ksmd();
    let spent = || cpu_ms(ksmd) + fleet.pids().map(cpu_ms).sum::<f64>();
    let before = spent();
    wait();
    let spent = spent() - before;
    (fleet.memory_mib(), spent)
}

fn main() {
    if fleet::role() {
        return;
    }
    let memory = Figure::new(
        "tetris-store/7",
        "memory of the same processes, beside kernel samepage merging after full scans",
        "MiB",
    );
    let scanning = Figure::new(
        "tetris-store/7b",
        "CPU time spent on finding what is equal, while the processes run",
        "ms",
    );
    for capability in [Capability::Ksm, Capability::Data] {
        if !capability.is_present() {
            memory.without(capability).emit().unwrap();
            scanning.without(capability).emit().unwrap();
            return;
        }
    }
    let directory = scratch::on_tmpfs().unwrap();
    let store = Store::open(StoreConfig::at(directory.path().join("store"))).unwrap();
    let model = bert::ingest(&store);
    let (processes, rounds) = if is_quick() { (2, 1) } else { (8, 3) };
    let (mut held, mut spent) = (Interleaved::default(), Interleaved::default());
    for _ in 0..rounds {
        let took;
        {
            let fleet = Fleet::mergeable(processes);
            let ksm = Ksm::start();
            let start = Instant::now();
            let (mib, ms) = idle(&fleet, Ksm::settle);
            took = start.elapsed();
            held.rival.push(mib);
            spent.rival.push(ms);
            drop((fleet, ksm));
        }
        // For as long as KSM took to find everything.
        let fleet = Fleet::sharing(processes, &store, &model);
        let (mib, ms) = idle(&fleet, || std::thread::sleep(took));
        held.ours.push(mib);
        spent.ours.push(ms);
    }
    let note = format!(
        "{processes} processes, MiniLM-L6, 90.9 MB; until three full scans find nothing new"
    );
    memory.against("KSM", held).note(&note).emit().unwrap();
    scanning.against("KSM", spent).note(note).emit().unwrap();
}
