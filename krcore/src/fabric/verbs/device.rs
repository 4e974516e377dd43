//! The device: what this crate needs of libibverbs, behind types that are safe to use.
//!
//! Of the crates over it, `ibverbs` registers only memory that it has allocated itself, keeps its
//! handles private, and panics where a device does not let go of something; so what stands here is on
//! the bindings that it uses itself.
//!
//! What makes posting safe: a device reaches no memory but what is registered, whose pages the kernel
//! keeps for it until the [`Registration`] is undone, mapped or not; and what is registered are regions,
//! which nobody sees as references.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use ibverbs_sys as ffi;

use super::VerbsConfig;
use crate::error::{Error, Result};
use crate::fabric::Status;
use crate::region::{Access, MemoryRegion};

/// The most READs and atomics that are under way on one pair; many adapters allow 16.
const READS: u8 = 16;
/// What an adapter waits before it tries a SEND again for which there was no buffer: 82 ms, six
/// times. Windows see to it that it never has to, unless the peer hangs.
const RNR_TIMER: u8 = 26;
const RNR_RETRIES: u8 = 6;

fn system(what: &'static str) -> Error {
    let source = io::Error::last_os_error();
    Error::Io { what, source }
}

fn checked(what: &'static str, code: i32) -> Result<()> {
    match code {
        0 => Ok(()),
        errno => Err(Error::Io {
            what,
            source: io::Error::from_raw_os_error(errno.abs()),
        }),
    }
}

/// How a peer's end of a connection is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Endpoint {
    pub(super) number: u32,
    pub(super) first_packet: u32,
    pub(super) lid: u16,
    pub(super) mtu: u8,
    pub(super) reads: u8,
    pub(super) gid: [u8; 16],
}

/// An open device with its protection domain, and the channel on which its completion queues report.
pub(super) struct Device {
    context: NonNull<ffi::ibv_context>,
    domain: NonNull<ffi::ibv_pd>,
    channel: NonNull<ffi::ibv_comp_channel>,
    port: u8,
    lid: u16,
    mtu: u8,
    reads: u8,
    gid_index: u8,
    gid: [u8; 16],
    /// The longest message, in bytes.
    pub(super) longest: u32,
}

// SAFETY: libibverbs is thread-safe for all that is done with these handles here.
unsafe impl Send for Device {}
// SAFETY: as above; no method changes a field.
unsafe impl Sync for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("port", &self.port)
            .field("gid_index", &self.gid_index)
            .finish_non_exhaustive()
    }
}

/// The list that libibverbs makes, freed when it is dropped.
struct List(NonNull<*mut ffi::ibv_device>, usize);

impl List {
    fn get() -> Result<Self> {
        let mut count = 0;
        // SAFETY: `count` is a valid place for the number.
        let list = unsafe { ffi::ibv_get_device_list(&raw mut count) };
        let Some(list) = NonNull::new(list) else {
            let why = io::Error::last_os_error();
            return Err(Error::NoDevice(
                if why.raw_os_error() == Some(libc::ENOSYS) {
                    "this kernel has no RDMA: load ib_uverbs, and the driver of the adapter"
                        .to_owned()
                } else {
                    why.to_string()
                },
            ));
        };
        Ok(Self(list, usize::try_from(count).unwrap_or(0)))
    }

    fn devices(&self) -> impl Iterator<Item = NonNull<ffi::ibv_device>> + '_ {
        (0..self.1).filter_map(|at| {
            // SAFETY: the list has as many entries as were counted, and lives as long as `self`.
            let entry = unsafe { self.0.add(at) };
            // SAFETY: as above.
            NonNull::new(unsafe { entry.read() })
        })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: made by `ibv_get_device_list`, and freed once.
        unsafe { ffi::ibv_free_device_list(self.0.as_ptr()) };
    }
}

fn name(device: NonNull<ffi::ibv_device>) -> String {
    // SAFETY: a device of a list that lives.
    let name = unsafe { ffi::ibv_get_device_name(device.as_ptr()) };
    if name.is_null() {
        return String::new();
    }
    // SAFETY: libibverbs gives a string that ends, and lives as long as the list.
    unsafe { CStr::from_ptr(name) }
        .to_string_lossy()
        .into_owned()
}

/// A context that is closed where it does not become a device.
struct Opened(NonNull<ffi::ibv_context>);

impl Opened {
    fn close(context: NonNull<ffi::ibv_context>) {
        // SAFETY: opened by `ibv_open_device`, and closed once, after all that was made of it.
        let code = unsafe { ffi::ibv_close_device(context.as_ptr()) };
        said("close a device", code);
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        Self::close(self.0);
    }
}

/// What cannot be helped, since it happens while something is dropped, is logged.
fn said(what: &'static str, code: i32) {
    if let Err(why) = checked(what, code) {
        tracing::warn!(%why, "the RDMA device keeps something");
    }
}

impl Device {
    /// Opens the device of that name, or the first whose port is up.
    pub(super) fn open(config: &VerbsConfig) -> Result<Arc<Self>> {
        let list = List::get()?;
        let mut seen = Vec::new();
        for device in list.devices() {
            let name = name(device);
            if config.device.as_ref().is_some_and(|wanted| *wanted != name) {
                continue;
            }
            match Self::open_one(device, config) {
                Ok(device) => return Ok(Arc::new(device)),
                Err(why) => seen.push(format!("{name}: {why}")),
            }
        }
        Err(Error::NoDevice(match (&config.device, seen.is_empty()) {
            (Some(name), true) => format!("none is called {name}"),
            (None, true) => "libibverbs knows none".to_owned(),
            (_, false) => seen.join("; "),
        }))
    }

    fn open_one(device: NonNull<ffi::ibv_device>, config: &VerbsConfig) -> Result<Self> {
        // SAFETY: a device of a list that lives.
        let context = unsafe { ffi::ibv_open_device(device.as_ptr()) };
        let context = Opened(NonNull::new(context).ok_or_else(|| system("open an RDMA device"))?);
        let at = context.0.as_ptr();
        let mut port = ffi::ibv_port_attr::default();
        // SAFETY: an open context, and a place of the type that newer libraries fill; older ones fill
        // its beginning, which is all they know.
        let code = unsafe { ffi::ibv_query_port(at, config.port, (&raw mut port).cast()) };
        checked("ask for an RDMA port", code)?;
        if port.state != ffi::ibv_port_state::IBV_PORT_ACTIVE {
            return Err(Error::NoDevice("its port is down".to_owned()));
        }
        let mut limits = ffi::ibv_device_attr::default();
        // SAFETY: an open context, and a place for the answer.
        let code = unsafe { ffi::ibv_query_device(at, &raw mut limits) };
        checked("ask for an RDMA device's limits", code)?;
        let (gid_index, gid) = gid(context.0, &port, config)?;
        // SAFETY: an open context.
        let domain = unsafe { ffi::ibv_alloc_pd(at) };
        let domain = NonNull::new(domain).ok_or_else(|| system("make a protection domain"))?;
        // SAFETY: an open context.
        let channel = unsafe { ffi::ibv_create_comp_channel(at) };
        let Some(channel) = NonNull::new(channel) else {
            let why = system("make a completion channel");
            // SAFETY: just made, and nothing was made of it.
            said("free a domain", unsafe {
                ffi::ibv_dealloc_pd(domain.as_ptr())
            });
            return Err(why);
        };
        let context = std::mem::ManuallyDrop::new(context).0;
        let device = Self {
            context,
            domain,
            channel,
            port: config.port,
            lid: port.lid,
            mtu: port.active_mtu as u8,
            reads: READS.min(limits.max_qp_rd_atom.clamp(1, 255) as u8),
            gid_index,
            gid,
            longest: port.max_msg_sz.min(1 << 31),
        };
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(device.as_fd(), nix::fcntl::FcntlArg::F_SETFL(flags)).map_err(|e| {
            Error::Io {
                what: "read a completion channel without waiting",
                source: e.into(),
            }
        })?;
        Ok(device)
    }

    /// The functions of the device's driver, which need no system call.
    fn driver(&self) -> &ffi::ibv_context_ops {
        // SAFETY: an open context, whose functions do not change.
        &unsafe { self.context.as_ref() }.ops
    }

    /// The number by which the next completion queue that has something was made. Several may have
    /// one number only where one is gone.
    pub(super) fn next_event(&self) -> Option<u64> {
        let mut queue = std::ptr::null_mut();
        let mut context = std::ptr::null_mut();
        // SAFETY: an open channel, and places for the answer.
        let code = unsafe {
            ffi::ibv_get_cq_event(self.channel.as_ptr(), &raw mut queue, &raw mut context)
        };
        if code != 0 {
            return None;
        }
        // SAFETY: a queue is destroyed only when the events that were read of it are acknowledged, as
        // this one is now.
        unsafe { ffi::ibv_ack_cq_events(queue, 1) };
        Some(context as u64)
    }
}

/// The port's address: a RoCE v2 one with an IPv4 address where there is one, since that goes through
/// routers and has a host's own address in it.
fn gid(
    context: NonNull<ffi::ibv_context>,
    port: &ffi::ibv_port_attr,
    config: &VerbsConfig,
) -> Result<(u8, [u8; 16])> {
    let length = usize::try_from(port.gid_tbl_len).unwrap_or(0).min(256);
    let mut entries = vec![ffi::ibv_gid_entry::default(); length];
    let size = size_of::<ffi::ibv_gid_entry>();
    let at = entries.as_mut_ptr();
    // SAFETY: an open context, and as many places as are said.
    let count = unsafe { ffi::_ibv_query_gid_table(context.as_ptr(), at, length, 0, size) };
    entries.truncate(usize::try_from(count).unwrap_or(0));
    let rank = |entry: &ffi::ibv_gid_entry| {
        let raw = bytes(entry.gid);
        let v4 = raw[..10] == [0; 10] && raw[10..12] == [0xFF; 2];
        (entry.gid_type == ffi::IBV_GID_TYPE_ROCE_V2, v4)
    };
    entries
        .iter()
        .filter(|entry| entry.port_num == u32::from(config.port) && entry.gid_index < 256)
        .filter(|entry| {
            config
                .gid
                .is_none_or(|index| entry.gid_index == u32::from(index))
        })
        .max_by_key(|entry| (rank(entry), std::cmp::Reverse(entry.gid_index)))
        .map(|entry| (entry.gid_index as u8, bytes(entry.gid)))
        .ok_or_else(|| Error::NoDevice("its port has no such GID".to_owned()))
}

fn bytes(gid: ffi::ibv_gid) -> [u8; 16] {
    // SAFETY: both views of the union are 16 bytes of any value.
    unsafe { gid.raw }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: an open channel.
        let fd = unsafe { self.channel.as_ref() }.fd;
        // SAFETY: the channel's own descriptor, open as long as the device.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: all that was made of it holds the device, so that it is gone.
        let code = unsafe { ffi::ibv_destroy_comp_channel(self.channel.as_ptr()) };
        said("destroy a completion channel", code);
        // SAFETY: as above.
        let code = unsafe { ffi::ibv_dealloc_pd(self.domain.as_ptr()) };
        said("free a protection domain", code);
        Opened::close(self.context);
    }
}

/// Memory that the device may reach: a region, without a copy.
pub(crate) struct Registration {
    entry: NonNull<ffi::ibv_mr>,
    base: u64,
    device: Arc<Device>,
}

// SAFETY: a registration is a handle, which libibverbs lets any thread use.
unsafe impl Send for Registration {}
// SAFETY: as above; its fields do not change.
unsafe impl Sync for Registration {}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").finish_non_exhaustive()
    }
}

impl Registration {
    /// Lets this side, and peers as `access` says, reach `region`.
    pub(super) fn new(device: &Arc<Device>, region: &MemoryRegion, access: Access) -> Result<Self> {
        let local = ffi::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE;
        let read = local | ffi::ibv_access_flags::IBV_ACCESS_REMOTE_READ;
        let flags = match access {
            Access::Local => local,
            Access::Read => read,
            Access::ReadWrite => {
                read | ffi::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE
                    | ffi::ibv_access_flags::IBV_ACCESS_REMOTE_ATOMIC
            }
        };
        // SAFETY: the range is the region's mapping, which cannot shrink. Its pages are the kernel's to
        // keep until this is undone, whether or not they are mapped; the device is one more who writes
        // to shared memory.
        let entry = unsafe {
            ffi::ibv_reg_mr(
                device.domain.as_ptr(),
                region.base().cast(),
                region.len(),
                flags.0 as i32,
            )
        };
        Ok(Self {
            entry: NonNull::new(entry).ok_or_else(|| {
                system("register a region with the RDMA device (is `ulimit -l` high enough?)")
            })?,
            base: region.base() as u64,
            device: Arc::clone(device),
        })
    }

    /// That of a region for this side's use: made when it is used first, and undone with the region.
    pub(super) fn of(device: &Arc<Device>, region: &MemoryRegion) -> Result<Arc<Self>> {
        let mut all = region.registrations();
        if let Some(known) = all.iter().find(|one| Arc::ptr_eq(&one.device, device)) {
            return Ok(Arc::clone(known));
        }
        let new = Arc::new(Self::new(device, region, Access::Local)?);
        all.push(Arc::clone(&new));
        Ok(new)
    }

    fn local_key(&self) -> u32 {
        // SAFETY: a registration that lives.
        unsafe { self.entry.as_ref() }.lkey
    }

    /// What peers name it by.
    pub(super) fn remote_key(&self) -> u32 {
        // SAFETY: a registration that lives.
        unsafe { self.entry.as_ref() }.rkey
    }

    /// Where it begins.
    pub(super) fn address(&self) -> u64 {
        self.base
    }

    /// `len` bytes from `offset` on. The device checks that they are inside.
    pub(super) fn part(&self, offset: u64, len: u32) -> Part {
        Part(ffi::ibv_sge {
            addr: self.address().wrapping_add(offset),
            length: len,
            lkey: self.local_key(),
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: made by `ibv_reg_mr`, and undone once.
        said("deregister a region", unsafe {
            ffi::ibv_dereg_mr(self.entry.as_ptr())
        });
    }
}

/// Local bytes of a request.
#[derive(Clone, Copy, Default)]
pub(super) struct Part(ffi::ibv_sge);

/// What the device is to do.
#[derive(Clone, Copy)]
pub(super) enum Verb {
    Read {
        address: u64,
        key: u32,
    },
    Write {
        address: u64,
        key: u32,
    },
    CompareSwap {
        address: u64,
        key: u32,
        expected: u64,
        new: u64,
    },
    FetchAdd {
        address: u64,
        key: u32,
        add: u64,
    },
    Send,
}

/// A request for the device.
#[derive(Clone, Copy)]
pub(super) struct Work {
    pub(super) id: u64,
    pub(super) verb: Verb,
    pub(super) parts: [Part; 2],
    pub(super) count: usize,
    pub(super) signalled: bool,
    /// Not before the READs and atomics before it have completed.
    pub(super) fenced: bool,
}

/// What a completion says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) id: u64,
    pub(super) outcome: Outcome,
    /// Bytes that were received.
    pub(super) len: usize,
}

/// How a request of the device's ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Success,
    /// The peer has refused it: it was not executed, nor was any behind it.
    Refused(Status),
    /// It failed otherwise, and nobody knows what was executed of those behind it.
    Failed(Status),
}

fn outcome(code: Option<(ffi::ibv_wc_status::Type, u32)>) -> Outcome {
    use ffi::ibv_wc_status as wc;
    match code.map(|(status, _)| status) {
        None => Outcome::Success,
        Some(wc::IBV_WC_REM_ACCESS_ERR) => Outcome::Refused(Status::RemoteAccess),
        Some(wc::IBV_WC_REM_INV_REQ_ERR | wc::IBV_WC_REM_OP_ERR) => {
            Outcome::Refused(Status::RemoteInvalid)
        }
        Some(
            wc::IBV_WC_LOC_LEN_ERR
            | wc::IBV_WC_LOC_QP_OP_ERR
            | wc::IBV_WC_LOC_PROT_ERR
            | wc::IBV_WC_LOC_ACCESS_ERR,
        ) => Outcome::Failed(Status::LocalProtection),
        // Retries exceeded; or flushed, where the pair was put in ERR by nothing that completed.
        Some(_) => Outcome::Failed(Status::RetryExceeded),
    }
}

/// A reliable connection: a queue pair, and the completion queue of both its directions.
pub(super) struct Connection {
    pair: NonNull<ffi::ibv_qp>,
    queue: NonNull<ffi::ibv_cq>,
    device: Arc<Device>,
    first_packet: u32,
}

// SAFETY: handles, which libibverbs lets any thread use; what changes a connection takes `&mut`.
unsafe impl Send for Connection {}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    /// One that is not connected yet, for so many requests under way and posted buffers. Its events
    /// come under `number`.
    pub(super) fn new(device: &Arc<Device>, number: u64, sends: u32, buffers: u32) -> Result<Self> {
        let entries = i32::try_from(sends + buffers).unwrap_or(i32::MAX);
        // SAFETY: an open device and its channel; the number is only given back.
        let queue = unsafe {
            ffi::ibv_create_cq(
                device.context.as_ptr(),
                entries,
                number as *mut _,
                device.channel.as_ptr(),
                0,
            )
        };
        let queue = NonNull::new(queue).ok_or_else(|| system("make a completion queue"))?;
        let mut wanted = ffi::ibv_qp_init_attr {
            send_cq: queue.as_ptr(),
            recv_cq: queue.as_ptr(),
            qp_type: ffi::ibv_qp_type::IBV_QPT_RC,
            ..Default::default()
        };
        wanted.cap.max_send_wr = sends;
        wanted.cap.max_recv_wr = buffers;
        wanted.cap.max_send_sge = 2;
        wanted.cap.max_recv_sge = 1;
        // SAFETY: a domain and a queue that live, and what is wanted of the pair.
        let pair = unsafe { ffi::ibv_create_qp(device.domain.as_ptr(), &raw mut wanted) };
        let Some(pair) = NonNull::new(pair) else {
            let why = system("make a queue pair");
            // SAFETY: just made, and used by nobody.
            said("destroy a completion queue", unsafe {
                ffi::ibv_destroy_cq(queue.as_ptr())
            });
            return Err(why);
        };
        Ok(Self {
            pair,
            queue,
            device: Arc::clone(device),
            // 24 bits, that a packet of an earlier connection is not taken for one of this.
            first_packet: fastrand::u32(..1 << 24),
        })
    }

    /// How the peer reaches it.
    pub(super) fn endpoint(&self) -> Endpoint {
        Endpoint {
            // SAFETY: a pair that lives.
            number: unsafe { self.pair.as_ref() }.qp_num,
            first_packet: self.first_packet,
            lid: self.device.lid,
            mtu: self.device.mtu,
            reads: self.device.reads,
            gid: self.device.gid,
        }
    }

    /// Puts it through INIT and RTR to RTS.
    pub(super) fn connect(&mut self, peer: &Endpoint, config: &VerbsConfig) -> Result<()> {
        use ffi::ibv_access_flags as access;
        use ffi::ibv_qp_attr_mask as mask;
        let rights = access::IBV_ACCESS_REMOTE_READ
            | access::IBV_ACCESS_REMOTE_WRITE
            | access::IBV_ACCESS_REMOTE_ATOMIC;
        let init = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_INIT,
            port_num: self.device.port,
            qp_access_flags: rights.0,
            ..Default::default()
        };
        self.modify(
            init,
            mask::IBV_QP_STATE
                | mask::IBV_QP_PKEY_INDEX
                | mask::IBV_QP_PORT
                | mask::IBV_QP_ACCESS_FLAGS,
        )?;
        let reads = self.device.reads.min(peer.reads).max(1);
        let mut receive = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTR,
            path_mtu: u32::from(self.device.mtu.min(peer.mtu).clamp(1, 5)),
            rq_psn: peer.first_packet & 0xFF_FFFF,
            dest_qp_num: peer.number & 0xFF_FFFF,
            max_dest_rd_atomic: reads,
            min_rnr_timer: RNR_TIMER,
            ..Default::default()
        };
        receive.ah_attr.dlid = peer.lid;
        receive.ah_attr.port_num = self.device.port;
        receive.ah_attr.is_global = 1;
        receive.ah_attr.grh.dgid = ffi::ibv_gid { raw: peer.gid };
        receive.ah_attr.grh.hop_limit = 64;
        receive.ah_attr.grh.sgid_index = self.device.gid_index;
        self.modify(
            receive,
            mask::IBV_QP_STATE
                | mask::IBV_QP_AV
                | mask::IBV_QP_PATH_MTU
                | mask::IBV_QP_DEST_QPN
                | mask::IBV_QP_RQ_PSN
                | mask::IBV_QP_MAX_DEST_RD_ATOMIC
                | mask::IBV_QP_MIN_RNR_TIMER,
        )?;
        let send = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTS,
            sq_psn: self.first_packet,
            timeout: timer(config.timeout),
            retry_cnt: config.retries.min(7),
            rnr_retry: RNR_RETRIES,
            max_rd_atomic: reads,
            ..Default::default()
        };
        self.modify(
            send,
            mask::IBV_QP_STATE
                | mask::IBV_QP_SQ_PSN
                | mask::IBV_QP_TIMEOUT
                | mask::IBV_QP_RETRY_CNT
                | mask::IBV_QP_RNR_RETRY
                | mask::IBV_QP_MAX_QP_RD_ATOMIC,
        )
    }

    fn modify(&mut self, mut to: ffi::ibv_qp_attr, mask: ffi::ibv_qp_attr_mask) -> Result<()> {
        // SAFETY: a pair that lives, and attributes of which those that the mask names are set.
        let code = unsafe { ffi::ibv_modify_qp(self.pair.as_ptr(), &raw mut to, mask.0 as i32) };
        checked("connect a queue pair", code)
    }

    /// Posts all of `work` with one ring of the device's bell; says how many it took.
    pub(super) fn post(&mut self, work: &[Work]) -> usize {
        let mut parts: Vec<[ffi::ibv_sge; 2]> = work
            .iter()
            .map(|work| work.parts.map(|part| part.0))
            .collect();
        let mut chain: Vec<ffi::ibv_send_wr> = work
            .iter()
            .zip(&mut parts)
            .map(|(work, parts)| request(work, parts))
            .collect();
        for at in (1..chain.len()).rev() {
            let next = &raw mut chain[at];
            chain[at - 1].next = next;
        }
        let Some(first) = chain.first_mut() else {
            return 0;
        };
        let first: *mut ffi::ibv_send_wr = first;
        let mut bad = std::ptr::null_mut();
        let Some(post) = self.device.driver().post_send else {
            return 0;
        };
        // SAFETY: the chain and its parts live over the call, which copies them. What they name is
        // registered memory only.
        let code = unsafe { post(self.pair.as_ptr(), first, &raw mut bad) };
        if code == 0 {
            return work.len();
        }
        let taken = (bad as usize).wrapping_sub(first as usize) / size_of::<ffi::ibv_send_wr>();
        taken.min(work.len())
    }

    /// Gives the device a buffer to receive into.
    pub(super) fn receive(&mut self, id: u64, mut part: Part) -> Result<()> {
        let mut request = ffi::ibv_recv_wr {
            wr_id: id,
            next: std::ptr::null_mut(),
            sg_list: &raw mut part.0,
            num_sge: 1,
        };
        let mut bad = std::ptr::null_mut();
        let Some(post) = self.device.driver().post_recv else {
            return Err(Error::NoDevice("its driver cannot receive".to_owned()));
        };
        // SAFETY: as in `post`.
        let code = unsafe { post(self.pair.as_ptr(), &raw mut request, &raw mut bad) };
        checked("post a receive buffer", code)
    }

    /// The completions there are, some of them.
    pub(super) fn poll(&mut self) -> impl Iterator<Item = Done> + use<> {
        const SOME: usize = 16;
        let mut entries = [const { None }; SOME];
        let mut raw = [ffi::ibv_wc::default(); SOME];
        let count = self.device.driver().poll_cq.map_or(0, |poll| {
            // SAFETY: as many places as are said.
            unsafe { poll(self.queue.as_ptr(), SOME as i32, raw.as_mut_ptr()) }
        });
        let count = usize::try_from(count).unwrap_or(0).min(SOME);
        for (entry, raw) in entries.iter_mut().zip(&raw[..count]) {
            *entry = Some(Done {
                id: raw.wr_id(),
                outcome: outcome(raw.error()),
                len: raw.len(),
            });
        }
        entries.into_iter().flatten()
    }

    /// Asks for one event when the next completion comes.
    pub(super) fn arm(&mut self) {
        if let Some(arm) = self.device.driver().req_notify_cq {
            // SAFETY: a queue that lives.
            said("arm a completion queue", unsafe {
                arm(self.queue.as_ptr(), 0)
            });
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: made by `ibv_create_qp`, and destroyed once. The device touches nothing for it
        // afterwards.
        said("destroy a queue pair", unsafe {
            ffi::ibv_destroy_qp(self.pair.as_ptr())
        });
        // SAFETY: made by `ibv_create_cq`; its only pair is gone.
        said("destroy a completion queue", unsafe {
            ffi::ibv_destroy_cq(self.queue.as_ptr())
        });
    }
}

fn request(work: &Work, parts: &mut [ffi::ibv_sge; 2]) -> ffi::ibv_send_wr {
    use ffi::ibv_wr_opcode as op;
    let mut flags = ffi::ibv_send_flags(0);
    if work.signalled {
        flags |= ffi::ibv_send_flags::IBV_SEND_SIGNALED;
    }
    if work.fenced {
        flags |= ffi::ibv_send_flags::IBV_SEND_FENCE;
    }
    let mut request = ffi::ibv_send_wr {
        wr_id: work.id,
        next: std::ptr::null_mut(),
        sg_list: parts.as_mut_ptr(),
        num_sge: work.count as i32,
        opcode: op::IBV_WR_SEND,
        send_flags: flags.0,
        __bindgen_anon_1: Default::default(),
        wr: Default::default(),
        qp_type: ffi::ibv_send_wr__bindgen_ty_3 {
            xrc: Default::default(),
        },
        __bindgen_anon_2: Default::default(),
    };
    let rdma = |remote_addr, rkey| ffi::ibv_send_wr__bindgen_ty_2 {
        rdma: ffi::ibv_send_wr__bindgen_ty_2__bindgen_ty_1 { remote_addr, rkey },
    };
    let atomic = |remote_addr, rkey, compare_add, swap| ffi::ibv_send_wr__bindgen_ty_2 {
        atomic: ffi::ibv_send_wr__bindgen_ty_2__bindgen_ty_2 {
            remote_addr,
            compare_add,
            swap,
            rkey,
        },
    };
    (request.opcode, request.wr) = match work.verb {
        Verb::Send => (op::IBV_WR_SEND, request.wr),
        Verb::Read { address, key } => (op::IBV_WR_RDMA_READ, rdma(address, key)),
        Verb::Write { address, key } => (op::IBV_WR_RDMA_WRITE, rdma(address, key)),
        Verb::CompareSwap {
            address,
            key,
            expected,
            new,
        } => (
            op::IBV_WR_ATOMIC_CMP_AND_SWP,
            atomic(address, key, expected, new),
        ),
        Verb::FetchAdd { address, key, add } => (
            op::IBV_WR_ATOMIC_FETCH_AND_ADD,
            atomic(address, key, add, 0),
        ),
    };
    request
}

/// The adapter's way to say a time: the least n with 4.096 us * 2^n not below it.
fn timer(limit: Duration) -> u8 {
    (1..31)
        .find(|n| Duration::from_nanos(4096 << n) >= limit)
        .unwrap_or(31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_limit_is_rounded_up_to_what_an_adapter_can_say() {
        assert_eq!(timer(Duration::from_micros(1)), 1);
        assert_eq!(timer(Duration::from_millis(67)), 14);
        assert_eq!(timer(Duration::from_millis(68)), 15);
        assert_eq!(timer(Duration::MAX), 31);
    }

    #[test]
    fn only_what_the_peer_has_refused_is_known_not_to_be_executed() {
        use ffi::ibv_wc_status as wc;
        assert_eq!(outcome(None), Outcome::Success);
        for (code, expected) in [
            (
                wc::IBV_WC_REM_ACCESS_ERR,
                Outcome::Refused(Status::RemoteAccess),
            ),
            (
                wc::IBV_WC_REM_INV_REQ_ERR,
                Outcome::Refused(Status::RemoteInvalid),
            ),
            (
                wc::IBV_WC_LOC_PROT_ERR,
                Outcome::Failed(Status::LocalProtection),
            ),
            (
                wc::IBV_WC_RETRY_EXC_ERR,
                Outcome::Failed(Status::RetryExceeded),
            ),
            (
                wc::IBV_WC_WR_FLUSH_ERR,
                Outcome::Failed(Status::RetryExceeded),
            ),
        ] {
            assert_eq!(outcome(Some((code, 0))), expected, "{code}");
        }
    }
}
