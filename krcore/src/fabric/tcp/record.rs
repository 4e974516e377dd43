//! Records: what stands between two lengths on the wire is sealed (ChaCha20-Poly1305, a counter as
//! the nonce), so that nothing can be read, changed, left out, repeated or put in another order
//! without the link being given up. Buffers have a fixed size, whatever the peer announces.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use snow::StatelessTransportState;

use super::frame::{CHUNK, Frame, LONGEST};
use super::peer::LinkError;

/// The most bytes in a record, before it is sealed.
const PLAIN: usize = 2 * LONGEST;
const TAG: usize = 16;
const LENGTH: usize = 2;
/// The longest record on the wire.
const SEALED: usize = LENGTH + PLAIN + TAG;
/// Bytes that wait to be sent before no more requests, or replies, are taken.
const WAITING: usize = 256 << 10;

/// The sending half of a link.
pub(super) struct Sender {
    cipher: Arc<StatelessTransportState>,
    nonce: u64,
    plain: Vec<u8>,
    out: Vec<u8>,
    /// How much of `out` was written.
    written: usize,
    /// What is sent is no longer of use.
    pub(super) closed: bool,
    /// A chunk on its way from a region to a frame.
    pub(super) buffer: Box<[u8]>,
}

impl Sender {
    pub(super) fn new(cipher: Arc<StatelessTransportState>) -> Self {
        Self {
            cipher,
            nonce: 0,
            plain: Vec::with_capacity(PLAIN),
            out: Vec::new(),
            written: 0,
            closed: false,
            buffer: vec![0; CHUNK].into_boxed_slice(),
        }
    }

    /// Bytes that wait to be sent.
    pub(super) fn waiting(&self) -> usize {
        self.out.len() - self.written + self.plain.len()
    }

    /// Whether another frame may be added, whatever its length.
    pub(super) fn has_room(&self) -> bool {
        self.waiting() + LONGEST <= WAITING
    }

    /// Adds a frame; it is sent by [`flush`](Self::flush).
    pub(super) fn put(&mut self, frame: &Frame<'_>) {
        if self.plain.len() + LONGEST > PLAIN {
            self.seal();
        }
        frame.encode(&mut self.plain);
    }

    fn seal(&mut self) {
        if self.plain.is_empty() {
            return;
        }
        let at = self.out.len();
        let sealed = self.plain.len() + TAG;
        self.out.resize(at + LENGTH + sealed, 0);
        let (_, record) = self.out.split_at_mut(at);
        let (length, record) = record.split_at_mut(LENGTH);
        length.copy_from_slice(&(sealed as u16).to_le_bytes());
        let done = self
            .cipher
            .write_message(self.nonce, &self.plain, record)
            .is_ok();
        // It fails only where the counter is used up, after 2^64 records.
        self.closed |= !done;
        self.nonce += 1;
        self.plain.clear();
    }

    /// Sends what the socket takes. True where something was sent or nothing waits.
    pub(super) fn flush(&mut self, mut stream: &TcpStream) -> Result<bool, LinkError> {
        self.seal();
        if self.closed {
            return Err(LinkError::Closed);
        }
        let mut any = self.waiting() == 0;
        while self.written < self.out.len() {
            match stream.write(&self.out[self.written..]) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(sent) => {
                    self.written += sent;
                    any = true;
                }
                Err(why) if why.kind() == ErrorKind::Interrupted => {}
                Err(why) if why.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Err(LinkError::Closed),
            }
        }
        if self.written == self.out.len() {
            self.out.clear();
            self.written = 0;
        } else if self.written > WAITING / 2 {
            self.out.drain(..self.written);
            self.written = 0;
        }
        Ok(any)
    }
}

/// The receiving half of a link.
pub(super) struct Receiver {
    cipher: Arc<StatelessTransportState>,
    nonce: u64,
    sealed: Box<[u8]>,
    begin: usize,
    end: usize,
    plain: Box<[u8]>,
}

impl Receiver {
    pub(super) fn new(cipher: Arc<StatelessTransportState>) -> Self {
        Self {
            cipher,
            nonce: 0,
            sealed: vec![0; 4 * SEALED].into_boxed_slice(),
            begin: 0,
            end: 0,
            plain: vec![0; PLAIN + TAG].into_boxed_slice(),
        }
    }

    /// The frames of the next record; `None` where it has not come yet.
    pub(super) fn next(&mut self, mut stream: &TcpStream) -> Result<Option<&[u8]>, LinkError> {
        loop {
            let held = &self.sealed[self.begin..self.end];
            if let Some((length, rest)) = held.split_first_chunk::<LENGTH>() {
                let length = usize::from(u16::from_le_bytes(*length));
                if length <= TAG || length > PLAIN + TAG {
                    return Err(LinkError::Garbled);
                }
                if let Some(record) = rest.get(..length) {
                    let read = self
                        .cipher
                        .read_message(self.nonce, record, &mut self.plain)
                        .map_err(|_| LinkError::Garbled)?;
                    self.nonce += 1;
                    self.begin += LENGTH + length;
                    return Ok(self.plain.get(..read));
                }
            }
            if self.begin > 0 {
                self.sealed.copy_within(self.begin..self.end, 0);
                self.end -= self.begin;
                self.begin = 0;
            }
            match stream.read(&mut self.sealed[self.end..]) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(read) => self.end += read,
                Err(why) if why.kind() == ErrorKind::Interrupted => {}
                Err(why) if why.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(_) => return Err(LinkError::Closed),
            }
        }
    }
}
