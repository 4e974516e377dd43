//! Messages between processes: one packet each, with descriptors beside it.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest packet; what is longer goes through a file in memory.
const PACKET: usize = 96 << 10;
/// The most descriptors beside one message.
const MOST_DESCRIPTORS: usize = 8;
/// First byte of a packet: the message itself, or the length of the file that holds it.
const INLINE: u8 = 0;
const IN_FILE: u8 = 1;

/// One end of a connection.
pub struct Channel {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Channel").field(&self.socket).finish()
    }
}

/// Why there is no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The other side is gone.
    Gone,
    /// The time is over.
    Late,
    /// A signal came.
    Interrupted,
    /// What came is no message.
    Garbled,
    /// The kernel refuses.
    Failed(Errno),
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone => f.write_str("it has ended"),
            Self::Late => f.write_str("it did not answer in time"),
            Self::Interrupted => f.write_str("a signal came"),
            Self::Garbled => f.write_str("it said what nobody understands"),
            // What a message with descriptors brings where there is no number left for them.
            Self::Failed(Errno::ENOBUFS) => f.write_str(Errno::EMFILE.desc()),
            Self::Failed(why) => f.write_str(why.desc()),
        }
    }
}

impl From<Errno> for Lost {
    fn from(why: Errno) -> Self {
        match why {
            Errno::EPIPE | Errno::ECONNRESET => Self::Gone,
            Errno::EINTR => Self::Interrupted,
            other => Self::Failed(other),
        }
    }
}

/// Two ends.
///
/// # Errors
/// Where there are no descriptors left.
pub fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
}

impl Channel {
    /// One end.
    pub const fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
        }
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// Where the other side is gone.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), Lost> {
        self.send_unless(message, fds, || false)
    }

    /// Sends a message with descriptors; where that takes so long that a signal comes, `give_up` says
    /// whether to leave it.
    ///
    /// # Errors
    /// Where the other side is gone, or it was left.
    pub fn send_unless(
        &self,
        message: &impl Serialize,
        fds: &[BorrowedFd<'_>],
        give_up: impl Fn() -> bool,
    ) -> Result<(), Lost> {
        let mut packet = postcard::to_extend(message, vec![INLINE]).map_err(|_| Lost::Garbled)?;
        let mut raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let file;
        if packet.len() > PACKET {
            file = in_file(&packet[1..])?;
            raw.insert(0, file.as_raw_fd());
            let len = packet.len() as u64 - 1;
            packet.clear();
            packet.push(IN_FILE);
            packet.extend_from_slice(&len.to_le_bytes());
        }
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
        loop {
            let parts = [IoSlice::new(&packet)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.socket.as_raw_fd(), &parts, rights, flags, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) if !give_up() => {}
                Err(why) => return Err(why.into()),
            }
        }
    }

    /// Waits for a message, at most until `deadline`.
    ///
    /// # Errors
    /// Why there is none.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        deadline: Option<Instant>,
    ) -> Result<(T, Vec<OwnedFd>), Lost> {
        if deadline.is_some() {
            wait_readable(self.socket.as_fd(), deadline)?;
        }
        if self.buffer.len() < PACKET + 16 {
            self.buffer.resize(PACKET + 16, 0);
        }
        let mut space = cmsg_space!([RawFd; MOST_DESCRIPTORS + 1]);
        let mut fds = Vec::new();
        let n = {
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message =
                recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
            for part in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = part {
                    // SAFETY: the kernel just gave them to this process.
                    fds.extend(
                        raw.into_iter()
                            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                    );
                }
            }
            message.bytes
        };
        match self.buffer.get(..n) {
            None | Some([]) => Err(Lost::Gone),
            Some([INLINE, rest @ ..]) => {
                let message = postcard::from_bytes(rest).map_err(|_| Lost::Garbled)?;
                Ok((message, fds))
            }
            Some([IN_FILE, len @ ..]) if !fds.is_empty() => {
                let len = len.try_into().map_err(|_| Lost::Garbled)?;
                let bytes = from_file(&fds.remove(0), u64::from_le_bytes(len))?;
                let message = postcard::from_bytes(&bytes).map_err(|_| Lost::Garbled)?;
                Ok((message, fds))
            }
            Some(_) => Err(Lost::Garbled),
        }
    }

    /// Whether a message, or the end, is there already.
    pub fn is_ready(&self) -> bool {
        wait_readable(self.socket.as_fd(), Some(Instant::now())).is_ok()
    }
}

/// Waits until there is something to read.
///
/// # Errors
/// [`Lost::Late`] where there is nothing until `deadline`.
pub fn wait_readable(fd: BorrowedFd<'_>, deadline: Option<Instant>) -> Result<(), Lost> {
    loop {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                // Rounded up, so that it is not polled without end in the last millisecond.
                let left = if left.is_zero() {
                    left
                } else {
                    left + Duration::from_millis(1)
                };
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
        match nix::poll::poll(&mut polled, timeout) {
            Ok(0) if deadline.is_some_and(|at| Instant::now() >= at) => return Err(Lost::Late),
            Ok(0) => {}
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(why) => return Err(Lost::Failed(why)),
        }
    }
}

fn in_file(bytes: &[u8]) -> Result<OwnedFd, Lost> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let file = nix::sys::memfd::memfd_create(c"rund-message", flags)?;
    let mut done = 0;
    while done < bytes.len() {
        done += nix::unistd::write(&file, &bytes[done..])?;
    }
    Ok(file)
}

fn from_file(file: &OwnedFd, len: u64) -> Result<Vec<u8>, Lost> {
    /// No message is longer.
    const MOST: u64 = 256 << 20;
    if len > MOST {
        return Err(Lost::Garbled);
    }
    let mut bytes = vec![0; len as usize];
    let mut done = 0;
    while done < bytes.len() {
        match nix::sys::uio::pread(file, &mut bytes[done..], done as i64)? {
            0 => return Err(Lost::Garbled),
            n => done += n,
        }
    }
    Ok(bytes)
}
