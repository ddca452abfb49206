//! Messages on their way out, and the descriptors that go with some.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::net::UnixStream;

/// Replies in the order of their requests.
#[derive(Default)]
pub(super) struct Replies {
    bytes: Vec<u8>,
    /// With which of the bytes each goes, counted from the first that is still here.
    files: VecDeque<(usize, OwnedFd)>,
}

impl Replies {
    /// Adds a message, and what goes with it.
    pub(super) fn push(&mut self, reply: &[u8], file: Option<OwnedFd>) {
        self.files.extend(file.map(|file| (self.bytes.len(), file)));
        self.bytes.extend_from_slice(reply);
    }

    /// Bytes that have not been sent.
    pub(super) fn waiting(&self) -> usize {
        self.bytes.len()
    }

    /// Sends what the socket takes, with one descriptor at most: up to the next that has one.
    ///
    /// # Errors
    /// The socket's, of which `WouldBlock` passes.
    pub(super) fn send(&mut self, stream: &UnixStream) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let due = self.files.front().filter(|(at, _)| *at == 0);
        let due = due.map(|(_, file)| [file.as_fd()]);
        if let Some(file) = &due {
            let has_space = control.push(SendAncillaryMessage::ScmRights(file));
            assert!(has_space, "it was made for one");
        }
        let next = self.files.get(usize::from(due.is_some()));
        let end = next.map_or(self.bytes.len(), |&(at, _)| at);
        let bytes = [IoSlice::new(&self.bytes[..end])];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = sendmsg(stream.as_fd(), &bytes, &mut control, flags)?;
        // A descriptor has gone with the first byte.
        if due.is_some() && sent > 0 {
            self.files.pop_front();
        }
        self.bytes.drain(..sent);
        self.files.iter_mut().for_each(|(at, _)| *at -= sent);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSliceMut, Read as _};

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    /// Receives what is there, as one piece: its bytes and how many descriptors came with them.
    fn receive(from: &std::os::unix::net::UnixStream) -> (usize, usize) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 100];
        let received = recvmsg(
            from,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::empty(),
        );
        let files = control.drain().map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => files.count(),
            _ => 0,
        });
        (received.unwrap().bytes, files.sum())
    }

    #[tokio::test]
    async fn a_descriptor_goes_with_the_message_it_belongs_to() {
        let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let near = UnixStream::from_std(near).unwrap();
        let file = || std::fs::File::open("/proc/self/status").unwrap().into();
        let mut replies = Replies::default();
        replies.push(&[1; 10], None);
        replies.push(&[2; 20], Some(file()));
        replies.push(&[3; 30], None);
        replies.push(&[4; 40], Some(file()));
        for expected in [(10, 0), (50, 1), (40, 1)] {
            replies.send(&near).unwrap();
            assert_eq!(receive(&far), expected);
        }
        assert_eq!(replies.waiting(), 0);
        drop(near);
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
    }
}
