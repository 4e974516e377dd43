//! The rival: what a program does with librdmacm and libibverbs by itself.

use std::ffi::{c_int, c_void};
use std::net::SocketAddrV4;
use std::ptr::{NonNull, null_mut};
use std::time::{Duration, Instant};

use ibverbs_sys as ffi;

const PORT_SPACE_TCP: c_int = 0x0106;
const BYTES: usize = 4096;
const LIMIT: Duration = Duration::from_secs(10);

/// The beginning of `struct rdma_cm_id`.
#[repr(C)]
struct Id {
    verbs: *mut ffi::ibv_context,
    channel: *mut c_void,
    context: *mut c_void,
    pair: *mut ffi::ibv_qp,
}

#[repr(C)]
#[derive(Default)]
struct Parameters {
    private_data: usize,
    private_data_len: u8,
    responder_resources: u8,
    initiator_depth: u8,
    flow_control: u8,
    retry_count: u8,
    rnr_retry_count: u8,
    srq: u8,
    pair: u32,
}

#[link(name = "rdmacm")]
unsafe extern "C" {
    fn rdma_create_id(
        channel: *mut c_void,
        id: *mut *mut Id,
        context: *mut c_void,
        space: c_int,
    ) -> c_int;
    fn rdma_destroy_id(id: *mut Id) -> c_int;
    fn rdma_bind_addr(id: *mut Id, at: *const libc::sockaddr_in) -> c_int;
    fn rdma_listen(id: *mut Id, backlog: c_int) -> c_int;
    fn rdma_get_request(listener: *mut Id, id: *mut *mut Id) -> c_int;
    fn rdma_resolve_addr(
        id: *mut Id,
        from: *const libc::sockaddr_in,
        to: *const libc::sockaddr_in,
        limit_ms: c_int,
    ) -> c_int;
    fn rdma_resolve_route(id: *mut Id, limit_ms: c_int) -> c_int;
    fn rdma_create_qp(
        id: *mut Id,
        domain: *mut ffi::ibv_pd,
        wanted: *mut ffi::ibv_qp_init_attr,
    ) -> c_int;
    fn rdma_connect(id: *mut Id, parameters: *mut Parameters) -> c_int;
    fn rdma_accept(id: *mut Id, parameters: *mut Parameters) -> c_int;
    fn rdma_destroy_qp(id: *mut Id);
}

#[track_caller]
fn worked(code: c_int) {
    assert_eq!(code, 0, "{}", std::io::Error::last_os_error());
}

fn address(of: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: of.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from(*of.ip()).to_be(),
        },
        sin_zero: [0; 8],
    }
}

fn parameters() -> Parameters {
    Parameters {
        responder_resources: 4,
        initiator_depth: 4,
        retry_count: 7,
        rnr_retry_count: 7,
        ..Parameters::default()
    }
}

/// One end of a connection. Its calls wait, since it has no event channel.
pub(crate) struct End(NonNull<Id>);

// SAFETY: librdmacm is thread-safe, and an end is used by one thread at a time.
unsafe impl Send for End {}

impl End {
    fn new() -> Self {
        let mut id = null_mut();
        // SAFETY: a place for the id; without a channel its calls wait.
        worked(unsafe { rdma_create_id(null_mut(), &raw mut id, null_mut(), PORT_SPACE_TCP) });
        Self(NonNull::new(id).unwrap())
    }

    /// With completion queues and a domain of its own.
    fn make_pair(&self) {
        let mut wanted = ffi::ibv_qp_init_attr {
            qp_type: ffi::ibv_qp_type::IBV_QPT_RC,
            ..Default::default()
        };
        wanted.cap.max_send_wr = 16;
        wanted.cap.max_recv_wr = 1;
        wanted.cap.max_send_sge = 1;
        wanted.cap.max_recv_sge = 1;
        // SAFETY: an id with an address, and what is wanted.
        worked(unsafe { rdma_create_qp(self.0.as_ptr(), null_mut(), &raw mut wanted) });
    }

    pub(crate) fn listen(at: SocketAddrV4) -> Self {
        let end = Self::new();
        let at = address(at);
        // SAFETY: a living id, and an address for the time of the call.
        worked(unsafe { rdma_bind_addr(end.0.as_ptr(), &raw const at) });
        // SAFETY: as above.
        worked(unsafe { rdma_listen(end.0.as_ptr(), 64) });
        end
    }

    pub(crate) fn accept(&self) -> Self {
        let mut id = null_mut();
        // SAFETY: a listening id, and a place for the new one.
        worked(unsafe { rdma_get_request(self.0.as_ptr(), &raw mut id) });
        let end = Self(NonNull::new(id).unwrap());
        end.make_pair();
        let mut parameters = parameters();
        // SAFETY: a living id, and parameters for the time of the call.
        worked(unsafe { rdma_accept(id, &raw mut parameters) });
        end
    }

    /// All that a program has to do to have a connection, the device being open.
    pub(crate) fn connect(to: SocketAddrV4) -> Self {
        let end = Self::new();
        let id = end.0.as_ptr();
        let limit = LIMIT.as_millis() as c_int;
        let to = address(to);
        // SAFETY: a living id, and an address for the time of the call.
        worked(unsafe { rdma_resolve_addr(id, std::ptr::null(), &raw const to, limit) });
        // SAFETY: a living id.
        worked(unsafe { rdma_resolve_route(id, limit) });
        end.make_pair();
        let mut parameters = parameters();
        // SAFETY: a living id, and parameters for the time of the call.
        worked(unsafe { rdma_connect(id, &raw mut parameters) });
        end
    }

    fn pair(&self) -> NonNull<ffi::ibv_qp> {
        // SAFETY: a living id.
        NonNull::new(unsafe { self.0.as_ref() }.pair).unwrap()
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let id = self.0.as_ptr();
        // SAFETY: a living id.
        if !unsafe { self.0.as_ref() }.pair.is_null() {
            // Without saying goodbye first, for which the other end would have to answer.
            // SAFETY: it has a pair, which nobody uses any more.
            unsafe { rdma_destroy_qp(id) };
        }
        // SAFETY: nothing of it is left.
        let _gone = unsafe { rdma_destroy_id(id) };
    }
}

/// Memory that an end's domain has registered.
pub(crate) struct Memory {
    entry: NonNull<ffi::ibv_mr>,
    bytes: NonNull<u8>,
}

// SAFETY: it is looked at by address and key only.
unsafe impl Send for Memory {}

impl Memory {
    pub(crate) fn new(end: &End) -> Self {
        let bytes = Box::leak(vec![0_u8; BYTES].into_boxed_slice());
        let bytes = NonNull::from(bytes).cast::<u8>();
        let flags = ffi::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE
            | ffi::ibv_access_flags::IBV_ACCESS_REMOTE_READ;
        // SAFETY: a pair that lives.
        let domain = unsafe { end.pair().as_ref() }.pd;
        // SAFETY: bytes that are never freed.
        let entry =
            unsafe { ffi::ibv_reg_mr(domain, bytes.as_ptr().cast(), BYTES, flags.0 as c_int) };
        Self {
            entry: NonNull::new(entry).unwrap(),
            bytes,
        }
    }

    /// Where a peer finds it.
    pub(crate) fn remote(&self) -> (u64, u32) {
        // SAFETY: a registration that lives.
        (
            self.bytes.as_ptr() as u64,
            unsafe { self.entry.as_ref() }.rkey,
        )
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: registered once.
        let _gone = unsafe { ffi::ibv_dereg_mr(self.entry.as_ptr()) };
    }
}

/// Eight bytes from there, by the shortest way: posted, and polled until they are here.
pub(crate) fn read(end: &End, local: &Memory, (remote_addr, rkey): (u64, u32)) {
    let mut part = ffi::ibv_sge {
        addr: local.bytes.as_ptr() as u64,
        length: 8,
        // SAFETY: a registration that lives.
        lkey: unsafe { local.entry.as_ref() }.lkey,
    };
    let mut request = ffi::ibv_send_wr {
        wr_id: 1,
        next: null_mut(),
        sg_list: &raw mut part,
        num_sge: 1,
        opcode: ffi::ibv_wr_opcode::IBV_WR_RDMA_READ,
        send_flags: ffi::ibv_send_flags::IBV_SEND_SIGNALED.0,
        __bindgen_anon_1: Default::default(),
        wr: ffi::ibv_send_wr__bindgen_ty_2 {
            rdma: ffi::ibv_send_wr__bindgen_ty_2__bindgen_ty_1 { remote_addr, rkey },
        },
        qp_type: ffi::ibv_send_wr__bindgen_ty_3 {
            xrc: Default::default(),
        },
        __bindgen_anon_2: Default::default(),
    };
    let pair = end.pair().as_ptr();
    // SAFETY: a pair that lives.
    let (context, queue) = unsafe { ((*pair).context, (*pair).send_cq) };
    // SAFETY: a context that is open.
    let driver = unsafe { &(*context).ops };
    let mut bad = null_mut();
    // SAFETY: the request lives over the call, and what it names is registered.
    worked(unsafe { driver.post_send.unwrap()(pair, &raw mut request, &raw mut bad) });
    let begun = Instant::now();
    let mut done = ffi::ibv_wc::default();
    loop {
        // SAFETY: a queue that lives, and room for one entry.
        match unsafe { driver.poll_cq.unwrap()(queue, 1, &raw mut done) } {
            0 => std::thread::yield_now(),
            count => {
                assert!(count == 1 && done.is_valid(), "{:?}", done.error());
                return;
            }
        }
        assert!(begun.elapsed() < LIMIT, "no answer");
    }
}
