//! A machine with a node daemon on threads of the test's process.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test uses a part of it, and says what went wrong by failing"
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use krcore::{Config, Daemon, DaemonOptions, Node, NodeId, ShmFabric};

use crate::common::{SECOND, config};

pub(crate) struct Machine {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) fabric: ShmFabric,
    pub(crate) daemon: Option<Daemon>,
}

pub(crate) fn start(path: &Path, fabric: &ShmFabric, config: Config) -> Daemon {
    let node = Node::embedded(fabric.clone(), NodeId(1), config).unwrap();
    let options = DaemonOptions {
        trusted: true,
        executors: 1,
        ..DaemonOptions::default()
    };
    Daemon::start(path, node, options).unwrap()
}

pub(crate) fn machine_with(config: Config) -> Machine {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("krcored.sock");
    let fabric = ShmFabric::new();
    let daemon = Some(start(&path, &fabric, config));
    Machine {
        _dir: dir,
        path,
        fabric,
        daemon,
    }
}

pub(crate) fn machine() -> Machine {
    machine_with(config())
}

impl Machine {
    pub(crate) fn attach(&self) -> Node {
        Node::attach(&self.path, SECOND).unwrap()
    }

    pub(crate) fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }
}

pub(crate) fn until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "{what} took longer than {limit:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}
