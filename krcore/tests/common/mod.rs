//! What the tests share.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test uses a part of it, and says what went wrong by failing"
)]

use std::sync::Arc;
use std::time::Duration;

use krcore::fabric::Fabric;
use krcore::{Access, ByteSize, Config, MemoryRegion, MetaServer, Node, NodeId, ShmFabric};

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// Long runs with `CARLSBAD_SOAK=1`.
pub(crate) fn rounds(usual: usize, soak: usize) -> usize {
    if std::env::var_os("CARLSBAD_SOAK").is_some() {
        soak
    } else {
        usual
    }
}

/// The fabrics that the tests run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Shm,
    /// Shared memory whose pairs lag so many requests behind.
    Lagging(usize),
    /// Each node in a fabric of its own.
    #[cfg(feature = "tcp")]
    Tcp,
    /// Each node on an opening of the RDMA device of its own.
    #[cfg(feature = "verbs")]
    Verbs,
}

/// A network of nodes.
pub(crate) struct Net {
    kind: Kind,
    shm: ShmFabric,
    #[cfg(feature = "tcp")]
    tcp: std::sync::Mutex<std::collections::HashMap<NodeId, krcore::TcpFabric>>,
    #[cfg(feature = "verbs")]
    verbs: std::sync::Mutex<std::collections::HashMap<NodeId, krcore::VerbsFabric>>,
    /// Where the handshakes of its nodes are.
    #[cfg(feature = "verbs")]
    ports: u16,
}

/// Where nodes of a network of RDMA devices are that begins at this port: up to as many as it has.
#[cfg(feature = "verbs")]
const NODES: u16 = 128;

#[cfg(feature = "verbs")]
fn verbs_config(ports: u16) -> krcore::VerbsConfig {
    let at = |port| std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, port);
    krcore::VerbsConfig {
        peers: (0..NODES)
            .map(|node| (NodeId(u64::from(node)), at(ports + node)))
            .collect(),
        ..krcore::VerbsConfig::default()
    }
}

#[cfg(feature = "tcp")]
pub(crate) fn tcp_options() -> krcore::TcpOptions {
    krcore::TcpOptions {
        listen: Some("127.0.0.1:0".parse().unwrap()),
        ..krcore::TcpOptions::new(krcore::PresharedKey::new([7; 32]))
    }
}

impl Net {
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            shm: match kind {
                Kind::Lagging(lag) => ShmFabric::lagging(lag),
                _ => ShmFabric::new(),
            },
            #[cfg(feature = "tcp")]
            tcp: std::sync::Mutex::default(),
            #[cfg(feature = "verbs")]
            verbs: std::sync::Mutex::default(),
            #[cfg(feature = "verbs")]
            ports: {
                use std::sync::atomic::{AtomicU16, Ordering};
                static NEXT: AtomicU16 = AtomicU16::new(20_000);
                NEXT.fetch_add(NODES, Ordering::Relaxed)
            },
        }
    }

    /// The fabric that `node` joins.
    #[cfg_attr(not(feature = "tcp"), allow(unused_variables))]
    pub(crate) fn fabric(&self, node: NodeId) -> Arc<dyn Fabric> {
        match self.kind {
            Kind::Shm | Kind::Lagging(_) => Arc::new(self.shm.clone()),
            #[cfg(feature = "tcp")]
            Kind::Tcp => {
                let mut all = self.tcp.lock().unwrap();
                if !all.contains_key(&node) {
                    let fresh = krcore::TcpFabric::new(tcp_options()).unwrap();
                    for (other, fabric) in all.iter() {
                        fabric.set_peer(node, fresh.local_addr().unwrap());
                        fresh.set_peer(*other, fabric.local_addr().unwrap());
                    }
                    all.insert(node, fresh);
                }
                Arc::new(all[&node].clone())
            }
            #[cfg(feature = "verbs")]
            Kind::Verbs => {
                let mut all = self.verbs.lock().unwrap();
                let fabric = all.entry(node).or_insert_with(|| {
                    krcore::VerbsFabric::open(verbs_config(self.ports)).unwrap()
                });
                Arc::new(fabric.clone())
            }
        }
    }

    pub(crate) fn join(&self, node: u64, config: Config) -> krcore::Result<Node> {
        Node::on(self.fabric(NodeId(node)), NodeId(node), config)
    }

    pub(crate) fn node(&self, node: u64, config: Config) -> Node {
        self.join(node, config).unwrap()
    }

    pub(crate) fn meta(&self, node: u64, nodes: usize) -> Arc<MetaServer> {
        MetaServer::new(&*self.fabric(NodeId(node)), NodeId(node), nodes).unwrap()
    }

    /// A configuration with these metadata servers: in the same process, or in others.
    pub(crate) fn with_meta(&self, servers: &[Arc<MetaServer>]) -> Config {
        let mut all = config();
        match self.kind {
            Kind::Shm | Kind::Lagging(_) => all.meta = servers.to_vec(),
            #[cfg(feature = "tcp")]
            Kind::Tcp => all.tables = servers.iter().map(|server| server.table()).collect(),
            #[cfg(feature = "verbs")]
            Kind::Verbs => all.tables = servers.iter().map(|server| server.table()).collect(),
        }
        all
    }
}

/// Two embedded nodes that share one queue pair each.
pub(crate) struct Pair {
    pub(crate) net: Net,
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

pub(crate) fn pair_with(kind: Kind, config: Config) -> Pair {
    let net = Net::new(kind);
    let server = net.node(1, config.clone());
    let client = net.node(2, config);
    let far = server
        .register(ByteSize::kib(4), Access::ReadWrite)
        .unwrap();
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    Pair {
        net,
        server,
        client,
        far,
        near,
    }
}

pub(crate) fn pair(kind: Kind) -> Pair {
    pair_with(kind, config())
}

/// Tests that hold on every fabric.
#[macro_export]
macro_rules! on_every_fabric {
    (lag $lag:literal: $($name:ident)*) => {
        mod shm {
            $(#[test] fn $name() { super::$name($crate::common::Kind::Shm); })*
        }
        mod lagging_shm {
            $(#[test] fn $name() { super::$name($crate::common::Kind::Lagging($lag)); })*
        }
        #[cfg(feature = "tcp")]
        mod tcp {
            $(#[test] fn $name() { super::$name($crate::common::Kind::Tcp); })*
        }
        #[cfg(feature = "verbs")]
        mod verbs {
            $(#[test] fn $name() {
                carlsbad_kit::require!(carlsbad_kit::capability::Capability::Rdma);
                super::$name($crate::common::Kind::Verbs);
            })*
        }
    };
}

/// The 8 bytes at `offset`.
pub(crate) fn word(region: &MemoryRegion, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    assert!(region.read(offset, &mut bytes));
    u64::from_le_bytes(bytes)
}
