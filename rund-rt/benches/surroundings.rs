//! Figure 3: what lies around a sandbox. A control group leased beside one created and limited, by
//! 200 threads at once; and 200 split root file systems beside full copies of the tree.
#![allow(
    clippy::unwrap_used,
    reason = "a bench says what went wrong by failing"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{interleave, median, quantile, time_ms};
use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use rund_rt::Limits;
use rund_rt::cgroup::{CgroupPool, Claim, Controller, Hierarchy, PoolConfig, Version};
use rund_rt::rootfs::{Format, Image, Layer, LayerLimits, RootfsConfig, RootfsStore, Upper};

/// At once, as the figure says.
const SANDBOXES: usize = 200;
/// Copies that are really made; the others would take as long again and again.
const COPIES: usize = 10;

fn main() {
    groups();
    roots();
}

fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.memory = Some(ByteSize::mib(64));
    limits.cpus = Some(0.5);
    limits.processes = Some(64);
    limits
}

/// What 200 threads measure of `work`, in microseconds, all starting at once; what it gives is
/// dropped after the last clock has stopped.
fn at_once<T: Send>(work: impl Fn(usize) -> T + Sync) -> Vec<f64> {
    let barrier = Barrier::new(SANDBOXES);
    let done: Vec<(Duration, T)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..SANDBOXES)
            .map(|n| {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    let result = work(n);
                    (start.elapsed(), result)
                })
            })
            .collect();
        threads.into_iter().map(|one| one.join().unwrap()).collect()
    });
    done.into_iter()
        .map(|(time, _)| time.as_secs_f64() * 1e6)
        .collect()
}

fn p99(samples: &[f64]) -> f64 {
    quantile(samples, 0.99)
}

fn pool(hierarchy: &Hierarchy, claim: Claim) -> CgroupPool {
    let mut config = PoolConfig::default();
    config.name = "bench".to_owned();
    (config.ready, config.capacity, config.claim) = (SANDBOXES + 50, 4 * SANDBOXES, claim);
    CgroupPool::new(hierarchy.clone(), config).unwrap()
}

/// The rival: a group in every tree, with the same limits, as a container runtime makes one.
struct Rival {
    /// One parent in each tree, with what it controls.
    parents: Vec<(PathBuf, Vec<(&'static str, String)>)>,
}

impl Rival {
    fn new(pool: &CgroupPool) -> Self {
        let lease = pool.lease(&Limits::default()).unwrap();
        let version = lease.version();
        let bytes = ByteSize::mib(64).get().to_string();
        let mut parents: Vec<(PathBuf, Vec<_>)> = Vec::new();
        for controller in Controller::ALL {
            let Some(path) = lease.path(controller) else {
                continue;
            };
            let parent = path.parent().unwrap().to_owned();
            let files: Vec<(&'static str, String)> = match (version, controller) {
                (Version::V1, Controller::Memory) => vec![
                    ("memory.limit_in_bytes", bytes.clone()),
                    ("memory.memsw.limit_in_bytes", bytes.clone()),
                ],
                (Version::V2, Controller::Memory) => vec![
                    ("memory.max", bytes.clone()),
                    ("memory.swap.max", "0".to_owned()),
                    ("memory.oom.group", "1".to_owned()),
                ],
                (Version::V1, Controller::Cpu) => vec![("cpu.cfs_quota_us", "50000".to_owned())],
                (Version::V2, Controller::Cpu) => vec![("cpu.max", "50000 100000".to_owned())],
                (_, Controller::Pids) => vec![("pids.max", "64".to_owned())],
                _ => Vec::new(),
            };
            match parents.iter_mut().find(|(known, _)| *known == parent) {
                Some((_, known)) => known.extend(files),
                None => parents.push((parent, files)),
            }
        }
        Self { parents }
    }

    fn create(&self, n: usize) {
        for (parent, files) in &self.parents {
            let group = parent.join(format!("rival-{n}"));
            fs::create_dir(&group).unwrap();
            for (file, value) in files {
                fs::write(group.join(file), value).unwrap();
            }
        }
    }

    fn remove(&self) {
        for n in 0..SANDBOXES {
            for (parent, _) in &self.parents {
                fs::remove_dir(parent.join(format!("rival-{n}"))).unwrap();
            }
        }
    }
}

fn groups() {
    let figure = Figure::new(
        "rund-rt/3",
        "p99 of a leased control group with its limits written, 200 threads at once",
        "us",
    );
    if !Capability::Root.is_present() || !Capability::ControlGroups.is_present() {
        return figure.without(Capability::ControlGroups).emit().unwrap();
    }
    let (warm_up, rounds) = if is_quick() { (0, 1) } else { (1, 15) };
    let hierarchy = Hierarchy::detect().unwrap();
    let ours = pool(&hierarchy, Claim::Descriptor);
    let rival = Rival::new(&ours);
    let wanted = limits();
    let lease = |pool: &CgroupPool| {
        assert!(pool.wait_filled(Duration::from_secs(60)));
        at_once(|_| pool.lease(&wanted).unwrap())
    };
    let mut p50 = Vec::new();
    let samples = interleave(
        warm_up,
        rounds,
        || {
            let taken = lease(&ours);
            p50.push(median(&taken));
            p99(&taken)
        },
        || {
            // Nothing works in the background meanwhile.
            assert!(ours.wait_filled(Duration::from_secs(60)));
            while ours.stats().retired > 0 {
                thread::sleep(Duration::from_millis(1));
            }
            let taken = at_once(|n| rival.create(n));
            rival.remove();
            p99(&taken)
        },
    );
    // The same limits already written while the group waits: a lease is a pop.
    let written = {
        let mut config = PoolConfig::default();
        config.name = "written".to_owned();
        (config.ready, config.capacity) = (SANDBOXES + 50, 4 * SANDBOXES);
        config.limits = limits();
        let pool = CgroupPool::new(hierarchy.clone(), config).unwrap();
        let taken: Vec<_> = (0..rounds).map(|_| p99(&lease(&pool))).collect();
        median(&taken)
    };
    let renamed = (hierarchy.version() == Version::V1).then(|| {
        let pool = pool(&hierarchy, Claim::Rename);
        let taken: Vec<_> = (0..rounds).map(|_| p99(&lease(&pool))).collect();
        median(&taken)
    });
    let renamed = renamed.map_or(String::new(), |us| {
        format!("; claimed by renaming, as in the paper, {us:.0} us")
    });
    let note = format!(
        "cgroup {}, {} trees, memory, cpu and pids limited; p50 {:.1} us; with the limits written \
         while the group waits, p99 {written:.1} us{renamed}",
        hierarchy.version(),
        rival.parents.len(),
        median(&p50),
    );
    figure
        .against("mkdir and the same limits", samples)
        .note(note)
        .emit()
        .unwrap();
}

/// 40 MB in 800 files and 80 directories: about a small distribution's image.
fn tree(at: &Path) -> PathBuf {
    let tree = at.join("tree");
    for folder in 0..80 {
        let folder = tree.join(format!("usr/lib/{folder:02}"));
        fs::create_dir_all(&folder).unwrap();
        for file in 0..10 {
            fs::write(folder.join(format!("{file}")), vec![file; 50_000]).unwrap();
        }
    }
    tree
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn roots() {
    let figure = Figure::new("rund-rt/3b", "200 split root file systems", "ms");
    if !Capability::Root.is_present() || !Capability::TmpfsMount.is_present() {
        let figure = figure.without(Capability::TmpfsMount);
        Figure::new(
            "rund-rt/3c",
            "200 split root file systems beside full copies",
            "ms",
        )
        .without(Capability::TmpfsMount)
        .emit()
        .unwrap();
        return figure.emit().unwrap();
    }
    let (warm_up, rounds) = if is_quick() { (0, 1) } else { (1, 15) };
    let dir = scratch::on_tmpfs().unwrap();
    let tree = tree(dir.path());
    let layers = [Layer::Directory(tree.clone())];
    let path = dir.path().join("image");
    let built = Image::build(&layers, &path, Format::Erofs, &LayerLimits::default());
    let (image, lower) = match built {
        Ok(image) => (image, "erofs"),
        Err(_) => (
            Image::directory(&tree).unwrap(),
            "directory (no mkfs.erofs)",
        ),
    };
    let store = |upper| {
        let mut config = RootfsConfig::default();
        (config.run_dir, config.upper) = (dir.path().join("run"), upper);
        RootfsStore::open(&config).unwrap()
    };
    let shared = store(Upper::Shared {
        size: ByteSize::gib(1),
    });
    let under = shared.lower(&image).unwrap();
    let mut taken_down = Vec::new();
    let ours = || {
        let start = Instant::now();
        let roots: Vec<_> = (0..SANDBOXES)
            .map(|_| shared.split(&under).unwrap())
            .collect();
        let took = start.elapsed().as_secs_f64() * 1e3;
        // No write is visible elsewhere.
        fs::write(roots[0].path().join("new"), "x").unwrap();
        assert!(
            roots[1..]
                .iter()
                .all(|root| !root.path().join("new").exists())
        );
        taken_down.push(time_ms(|| drop(roots)));
        took
    };
    let rival = || {
        let copies = dir.path().join("copies");
        fs::create_dir(&copies).unwrap();
        let took = time_ms(|| (0..COPIES).for_each(|n| copy(&tree, &copies.join(n.to_string()))));
        fs::remove_dir_all(&copies).unwrap();
        took * (SANDBOXES / COPIES) as f64
    };
    let samples = interleave(warm_up, rounds, ours, rival);
    let own = store(Upper::Own {
        size: ByteSize::mib(16),
    });
    let under = own.lower(&image).unwrap();
    let each: Vec<_> = (0..rounds)
        .map(|_| {
            time_ms(|| {
                (0..SANDBOXES)
                    .map(|_| own.split(&under).unwrap())
                    .collect::<Vec<_>>()
            })
        })
        .collect();
    let note = format!(
        "{lower} below, a shared tmpfs above, volatile, one thread; taken down again in {:.0} ms; \
         with a sized tmpfs of its own for each {:.0} ms",
        median(&taken_down),
        median(&each),
    );
    figure
        .samples(samples.ours.clone())
        .note(&note)
        .emit()
        .unwrap();
    Figure::new(
        "rund-rt/3c",
        "200 split root file systems beside full copies",
        "ms",
    )
    .against(
        "200 copies of 40 MB in 800 files on tmpfs (20 x the time of 10)",
        samples,
    )
    .note(note)
    .emit()
    .unwrap();
}
