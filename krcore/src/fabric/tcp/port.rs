//! The nodes of this process.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::Handle;
use crate::error::Result;
use crate::fabric::{
    DcAddress, Op, Port, RawRequest, Received, SEND_HEADER, Sink, Status, execute,
};
use crate::node::{NodeId, Service};
use crate::region::{MemoryRegion, RKey};

/// The address of a node's port: its id, and a key that its next life does not have.
pub(super) fn address(node: NodeId) -> DcAddress {
    DcAddress {
        number: node.0 as u32,
        key: fastrand::u32(..),
        lid: (node.0 >> 32) as u16,
        gid: (node.0 >> 48) as u16,
    }
}

/// Whose address it is.
pub(super) fn node(address: DcAddress) -> NodeId {
    let high = u64::from(address.lid) | u64::from(address.gid) << 16;
    NodeId(u64::from(address.number) | high << 32)
}

/// What requests reach of a node.
pub(super) struct Target {
    pub(super) address: DcAddress,
    alive: AtomicBool,
    regions: RwLock<HashMap<u32, Arc<MemoryRegion>>>,
    pub(super) sink: Arc<dyn Sink>,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Target {
    pub(super) fn new(node: NodeId, sink: Arc<dyn Sink>) -> Arc<Self> {
        Arc::new(Self {
            address: address(node),
            alive: AtomicBool::new(true),
            regions: RwLock::default(),
            sink,
        })
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    pub(super) fn region(&self, key: RKey) -> Option<Arc<MemoryRegion>> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions.get(&key.0).cloned()
    }

    pub(super) fn deliver(&self, service: Service, header: &[u8; SEND_HEADER], body: Vec<u8>) {
        self.sink.deliver(Received {
            service,
            header: Box::new(*header),
            body,
        });
    }

    /// Executes a request of this process.
    pub(super) fn execute(&self, request: &RawRequest) -> Status {
        if !self.is_alive() {
            return Status::RetryExceeded;
        }
        let Op::Send(service) = request.op else {
            return match self.region(request.remote.key) {
                Some(region) => execute(&region, request.op, &request.local, request.remote.offset),
                None => Status::RemoteAccess,
            };
        };
        let Some(header) = &request.header else {
            return Status::RemoteInvalid;
        };
        let mut body = vec![0; request.local.len as usize];
        if !request.local.region.read(request.local.offset, &mut body) {
            return Status::LocalProtection;
        }
        self.deliver(service, header, body);
        Status::Success
    }
}

/// A node of this process.
#[derive(Debug)]
pub(super) struct TcpPort {
    pub(super) target: Arc<Target>,
    pub(super) fabric: Arc<Handle>,
}

impl Port for TcpPort {
    fn address(&self) -> DcAddress {
        self.target.address
    }

    fn expose(&self, region: &Arc<MemoryRegion>) -> Result<()> {
        let mut regions = self
            .target
            .regions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        regions.insert(region.key().0, Arc::clone(region));
        Ok(())
    }

    fn revoke(&self, key: RKey) {
        let mut regions = self
            .target
            .regions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        regions.remove(&key.0);
    }

    fn leave(&self) {
        self.target.alive.store(false, Ordering::Release);
        self.fabric.shared.leave(&self.target);
        self.target
            .regions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

impl Drop for TcpPort {
    fn drop(&mut self) {
        if self.target.is_alive() {
            self.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_says_whose_it_is() {
        for id in [0, 1, u64::MAX, 0x0102_0304_0506_0708] {
            assert_eq!(node(address(NodeId(id))), NodeId(id));
        }
    }
}
