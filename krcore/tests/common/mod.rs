//! What the tests share.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test uses a part of it, and says what went wrong by failing"
)]

use std::sync::Arc;
use std::time::Duration;

use krcore::{Access, ByteSize, Config, MemoryRegion, Node, NodeId, ShmFabric};

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// Long runs with `CARLSBAD_SOAK=1`.
pub(crate) fn rounds(usual: usize, soak: usize) -> usize {
    if std::env::var_os("CARLSBAD_SOAK").is_some() {
        soak
    } else {
        usual
    }
}

/// Two embedded nodes that share one queue pair each.
pub(crate) struct Pair {
    pub(crate) fabric: ShmFabric,
    pub(crate) server: Node,
    pub(crate) client: Node,
    pub(crate) far: Arc<MemoryRegion>,
    pub(crate) near: Arc<MemoryRegion>,
}

pub(crate) fn config() -> Config {
    Config {
        dynamic_pairs: 1,
        promote_after: 0,
        ..Config::default()
    }
}

pub(crate) fn pair_on(fabric: ShmFabric, config: Config) -> Pair {
    let server = Node::embedded(fabric.clone(), NodeId(1), config.clone()).unwrap();
    let client = Node::embedded(fabric.clone(), NodeId(2), config).unwrap();
    let far = server
        .register(ByteSize::kib(4), Access::ReadWrite)
        .unwrap();
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    Pair {
        fabric,
        server,
        client,
        far,
        near,
    }
}

pub(crate) fn pair() -> Pair {
    pair_on(ShmFabric::new(), config())
}

/// The 8 bytes at `offset`.
pub(crate) fn word(region: &MemoryRegion, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    assert!(region.read(offset, &mut bytes));
    u64::from_le_bytes(bytes)
}
