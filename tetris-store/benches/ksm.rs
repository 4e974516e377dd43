//! Figures 7, 7b and 7c: the same processes with kernel samepage merging, after it has found all.
//!
//! What the kernel keeps in order to share belongs to the memory of either side. KSM has an item of
//! 64 bytes for every page it scans, merged or not, and the kernel takes them off what it calls KSM's
//! profit (Documentation/admin-guide/mm/ksm.rst). The store has inodes, names and an index of pages.
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

/// An inode of tmpfs with its name, in bytes: `shmem_inode_cache` and `dentry` of /proc/slabinfo.
const INODE: u64 = 752 + 192;
/// A node of the index of a file's pages, in bytes, and how many pages it has: `radix_tree_node`.
const INDEX: (u64, u64) = (584, 64);

/// How long the kernel may take to find everything.
const PATIENCE: Duration = Duration::from_secs(300);

/// The kernel's settings, put back at the end.
struct Ksm {
    before: Vec<(&'static str, String)>,
}

impl Ksm {
    const SETTINGS: [&str; 3] = ["run", "pages_to_scan", "sleep_millisecs"];

    fn get(name: &str) -> i64 {
        let text = fs::read_to_string(Path::new("/sys/kernel/mm/ksm").join(name)).unwrap();
        text.trim().parse().unwrap()
    }

    /// What the kernel keeps for the merging, in MiB: the profit is what is merged less this.
    fn kept_mib() -> f64 {
        let merged = 4096 * (Self::get("pages_sharing") + Self::get("ksm_zero_pages"));
        mib((merged - Self::get("general_profit")) as u64)
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

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What the kernel keeps for the files of a store, in MiB.
fn kept_for(store: &Store) -> f64 {
    fn files(folder: &Path) -> Vec<u64> {
        let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
        entries
            .flat_map(|entry| match entry.file_type().unwrap().is_dir() {
                true => files(&entry.path()),
                false => vec![entry.metadata().unwrap().len()],
            })
            .collect()
    }
    let of_file = |len: u64| INODE + INDEX.0 * len.div_ceil(4096).div_ceil(INDEX.1);
    mib(files(store.root()).into_iter().map(of_file).sum())
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
    let alone = Figure::new(
        "tetris-store/7c",
        "memory of the same processes, without what the kernel keeps for sharing: sum of PSS",
        "MiB",
    );
    for capability in [Capability::Ksm, Capability::Data] {
        if !capability.is_present() {
            memory.without(capability).emit().unwrap();
            alone.without(capability).emit().unwrap();
            scanning.without(capability).emit().unwrap();
            return;
        }
    }
    let directory = scratch::on_tmpfs().unwrap();
    let store = Store::open(StoreConfig::at(directory.path().join("store"))).unwrap();
    let model = bert::ingest(&store);
    let (processes, rounds) = if is_quick() { (2, 1) } else { (8, 3) };
    let (mut held, mut spent) = (Interleaved::default(), Interleaved::default());
    let mut of_processes = Interleaved::default();
    for _ in 0..rounds {
        let took;
        {
            let fleet = Fleet::mergeable(processes);
            let ksm = Ksm::start();
            let start = Instant::now();
            let (mib, ms) = idle(&fleet, Ksm::settle);
            took = start.elapsed();
            of_processes.rival.push(mib);
            held.rival.push(mib + Ksm::kept_mib());
            spent.rival.push(ms);
            drop((fleet, ksm));
        }
        // For as long as KSM took to find everything.
        let fleet = Fleet::sharing(processes, &store, &model);
        let (mib, ms) = idle(&fleet, || std::thread::sleep(took));
        of_processes.ours.push(mib);
        held.ours.push(mib + kept_for(&store));
        spent.ours.push(ms);
    }
    let note = format!(
        "{processes} processes, MiniLM-L6, 90.9 MB; until three full scans find nothing new"
    );
    let kept = format!("{note}; with what the kernel keeps for sharing");
    memory.against("KSM", held).note(kept).emit().unwrap();
    alone
        .against("KSM", of_processes)
        .note(&note)
        .emit()
        .unwrap();
    scanning.against("KSM", spent).note(note).emit().unwrap();
}
