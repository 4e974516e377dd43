//! What the benches share: a node daemon in a process of its own.
#![allow(dead_code, reason = "each bench uses a part of it")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use carlsbad_kit::child::{self, Child, Role};
use krcore::{Config, Daemon, DaemonOptions, Node, NodeId, ShmFabric};

pub(crate) const SECOND: Duration = Duration::from_secs(1);
const ROLE: &str = "krcored";

/// Plays the daemon, if this process was started as one.
pub(crate) fn play() -> bool {
    let Some(path) = child::arguments::<PathBuf>(ROLE) else {
        return false;
    };
    let node = Node::embedded(ShmFabric::new(), NodeId(1), Config::default()).unwrap();
    let options = DaemonOptions {
        trusted: true,
        executors: 1,
        ..DaemonOptions::default()
    };
    let _daemon = Daemon::start(&path, node, options).unwrap();
    child::tell("ready");
    child::wait_for_parent();
    true
}

/// A daemon that ends with this.
pub(crate) struct Served {
    dir: tempfile::TempDir,
    _process: Child,
}

impl Served {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let process = Role::main(ROLE).start(&dir.path().join("socket")).unwrap();
        process.hear("ready").unwrap();
        Self {
            dir,
            _process: process,
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub(crate) fn attach(&self) -> Node {
        Node::attach(Path::new(&self.path()), SECOND).unwrap()
    }
}

/// Microseconds that one of `rounds` takes.
pub(crate) fn micros(rounds: u32, mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    (0..rounds).for_each(|_| work());
    start.elapsed().as_secs_f64() * 1e6 / f64::from(rounds)
}
