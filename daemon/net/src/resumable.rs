//! A control connection that outlives the TCP connection under it.
//!
//! Both sides keep what the other has not confirmed ([`memlane_protocol::resumption`]). When the connection breaks, the
//! caller [suspends](ResumableLink::suspend) it, and [resumes](ResumableLink::resume) it over another one. Senders wait
//! meanwhile, and notice nothing else. The caller itself does not: it would wait for what only it can do.

use std::cell::{Cell, RefCell};
use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

use memlane_protocol::resumption::{Resumption, ResumptionError};
use memlane_protocol::wire::control::Control;
use memlane_protocol::wire::hello::RESUMES;
use tokio::sync::{Mutex, oneshot, watch};

use crate::error::LinkError;
use crate::link::{Link, LinkSender};
use crate::task;

/// One end of a control connection that can be resumed. Dropping it closes the connection.
pub struct ResumableLink {
    /// This is `None` while the connection is suspended.
    link: Option<Link>,
    shared: Rc<Shared>,
}

/// The sending side of a [`ResumableLink`], for tasks that only send.
#[derive(Clone)]
pub struct ResumableSender(Rc<Shared>);

struct Shared {
    /// This is `None` if the other side speaks a version of the protocol in which connections are not resumed.
    resumption: Option<RefCell<Resumption>>,
    state: watch::Sender<State>,
    /// The connection was resumed so many times.
    resumed: Cell<u64>,
    /// This lock has one message written after the other.
    sending: Mutex<()>,
    /// This lock keeps the messages of the link's owner in order while they wait.
    owners: Mutex<()>,
}

#[derive(Clone)]
enum State {
    /// Messages go over this connection, which is the first, the second, and so on.
    Connected(LinkSender, u64),
    /// Messages wait for another connection.
    Suspended,
    /// No more messages are sent.
    Closed,
}

impl ResumableLink {
    /// Goes on over a link. Both sides do this at the same message, so that both count from there on.
    pub fn over(link: Link) -> Self {
        let resumption = (link.version() >= RESUMES).then(RefCell::default);
        let state = watch::Sender::new(State::Connected(link.sender(), 0));
        let shared = Shared {
            resumption,
            state,
            resumed: Cell::new(0),
            sending: Mutex::default(),
            owners: Mutex::default(),
        };
        Self { link: Some(link), shared: Rc::new(shared) }
    }

    /// Returns the sending side.
    pub fn sender(&self) -> ResumableSender {
        ResumableSender(self.shared.clone())
    }

    /// Sends a message, and returns when it is written to a socket, or is to be sent over the next connection because this one
    /// is broken: the caller has to listen to notice that, and to suspend the link.
    ///
    /// # Errors
    ///
    /// Fails if the link has ended, or is broken and cannot be resumed.
    pub async fn send(&self, message: &Control) -> Result<(), LinkError> {
        let (shared, message) = (self.shared.clone(), message.clone());
        let (waits, waiting) = oneshot::channel();
        let one_waits = shared.owners.try_lock().is_err();
        let sending = task::spawn("a message", async move {
            let _in_turn = shared.owners.lock().await;
            let waits = || {
                // Its caller may have gone.
                let _ = waits.send(());
            };
            shared.send(&message, waits).await
        });
        if one_waits {
            return Ok(());
        }
        tokio::select! {
            biased;
            sent = sending => sent.unwrap_or(Err(LinkError::Closed)),
            Ok(()) = waiting => Ok(()),
        }
    }

    /// Returns the next message that is no ping. While the connection is suspended, none comes.
    ///
    /// # Errors
    ///
    /// Fails when the connection breaks. The caller then suspends the link, or drops it.
    pub async fn receive(&mut self) -> Result<Control, LinkError> {
        loop {
            let Some(link) = &mut self.link else { return pending().await };
            let (message, bytes) = link.receive_with_length().await?;
            let Some(resumption) = &self.shared.resumption else { return Ok(message) };
            if let Control::Received(count) = message {
                resumption.borrow_mut().confirm(count)?;
                continue;
            }
            if let Some(count) = resumption.borrow_mut().receive(bytes) {
                // One that finds no room is made up for by a later one.
                link.post(&Control::Received(count));
            }
            return Ok(message);
        }
    }

    /// Waits, for a few seconds, until the other side closes the connection, if there is one: the side that closes first may
    /// lose its own last messages.
    pub async fn until_closed(&mut self) {
        if let Some(link) = &mut self.link {
            link.until_closed().await;
        }
    }

    /// Tells whether the link can be suspended and resumed.
    pub fn can_resume(&self) -> bool {
        self.shared.resumption.is_some()
    }

    /// Lets go of a connection that is broken. Senders wait from now on.
    pub fn suspend(&mut self) {
        self.link = None;
        self.shared.state.send_replace(State::Suspended);
    }

    /// Tells whether the link is suspended.
    pub fn is_suspended(&self) -> bool {
        self.link.is_none()
    }

    /// Returns how many messages were received, to tell the other side when the link is resumed.
    pub fn received(&self) -> u64 {
        self.shared.resumption.as_ref().map_or(0, |resumption| resumption.borrow_mut().tell())
    }

    /// Goes on over another link, in place of any before, after the other side has said that it has received `received`
    /// messages. What it has not is sent again, ahead of everything else.
    ///
    /// # Errors
    ///
    /// Fails if the other side cannot have received so many, or lacks some that are gone here.
    pub fn resume(&mut self, link: Link, received: u64) -> Result<(), ResumptionError> {
        let Some(resumption) = &self.shared.resumption else { return Err(ResumptionError::Forgotten) };
        let again = resumption.borrow_mut().resume(received)?;
        self.shared.state.send_replace(State::Suspended);
        let (sender, shared) = (link.sender(), self.shared.clone());
        let number = self.shared.resumed.get() + 1;
        self.shared.resumed.set(number);
        self.link = Some(link);
        task::spawn("messages that are sent again", async move {
            for bytes in again {
                // That the connection is broken is noticed by the task that listens to it.
                if sender.send_noted(bytes, |_| ()).await.is_err() {
                    return;
                }
            }
            // Another one may have taken its place meanwhile.
            if shared.resumed.get() == number {
                shared.state.send_if_modified(|state| {
                    let waits = matches!(state, State::Suspended);
                    if waits {
                        *state = State::Connected(sender, number);
                    }
                    waits
                });
            }
        });
        Ok(())
    }
}

impl Drop for ResumableLink {
    fn drop(&mut self) {
        self.shared.state.send_replace(State::Closed);
    }
}

impl ResumableSender {
    /// Sends a message, and returns when it is written to a socket. While the connection is suspended, it waits.
    ///
    /// # Errors
    ///
    /// Fails if the link has ended.
    pub async fn send(&self, message: &Control) -> Result<(), LinkError> {
        self.0.send(message, || ()).await
    }

    /// Tells whether the link is suspended.
    pub fn is_suspended(&self) -> bool {
        matches!(&*self.0.state.borrow(), State::Suspended)
    }

    /// Returns the shortest round trip of the last pings, once there was one on the present connection.
    pub fn round_trip(&self) -> Option<Duration> {
        match &*self.0.state.borrow() {
            State::Connected(sender, _) => sender.round_trip(),
            _ => None,
        }
    }
}

impl Shared {
    /// Sends a message. `waits` is called before another connection is waited for.
    async fn send(&self, message: &Control, waits: impl FnOnce()) -> Result<(), LinkError> {
        let (mut states, mut waits) = (self.state.subscribe(), Some(waits));
        let mut wait = || waits.take().map_or((), |waits| waits());
        loop {
            let state = states.borrow_and_update().clone();
            let (sender, number) = match state {
                State::Connected(sender, number) => (sender, number),
                State::Suspended => {
                    wait();
                    states.changed().await.map_err(|_| LinkError::Closed)?;
                    continue;
                }
                State::Closed => return Err(LinkError::Closed),
            };
            let Some(resumption) = &self.resumption else { return sender.send(message).await };
            let kept = Cell::new(false);
            let keep = |bytes: &[u8]| {
                resumption.borrow_mut().send(bytes.to_vec());
                kept.set(true);
            };
            let in_order = self.sending.lock().await;
            if sender.send_noted(message.encode(), keep).await.is_ok() {
                return Ok(());
            }
            drop(in_order);
            wait();
            let another = |state: &State| match state {
                State::Connected(_, now) => *now != number,
                State::Suspended => false,
                State::Closed => true,
            };
            let goes_on = states.wait_for(another).await.map_err(|_| LinkError::Closed)?;
            // What was kept was sent again when the connection was resumed.
            if kept.get() && matches!(*goes_on, State::Connected(..)) {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::link::tests::pair;

    fn message(number: u32) -> Control {
        Control::Iteration { number, pages: 1 }
    }

    fn number_of(message: &Control) -> u32 {
        match message {
            Control::Iteration { number, .. } => *number,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_is_lost_or_doubled_when_the_connection_breaks() {
        const MESSAGES: u32 = 400;
        tokio_uring::start(async {
            let (here, there) = pair().await;
            let (mut here, mut there) = (ResumableLink::over(here), ResumableLink::over(there));
            let sender = here.sender();
            let sending = task::spawn("sender", async move {
                for number in 0..MESSAGES {
                    sender.send(&message(number)).await.unwrap();
                    if number % 7 == 0 {
                        tokio::task::yield_now().await;
                    }
                }
            });
            let mut expected = 0;
            for breaks in 1.. {
                let until = if breaks < 12 { expected + 3 * breaks } else { MESSAGES };
                while expected < until {
                    // Whoever sends hears confirmations, and nothing else.
                    let came = tokio::select! {
                        came = there.receive() => came.unwrap(),
                        other = here.receive() => panic!("{other:?}"),
                    };
                    assert_eq!(number_of(&came), expected);
                    expected += 1;
                }
                if expected == MESSAGES {
                    break;
                }
                let (one, other) = pair().await;
                if breaks % 2 == 0 {
                    here.suspend();
                    there.suspend();
                }
                let (here_has, there_has) = (here.received(), there.received());
                here.resume(one, there_has).unwrap();
                there.resume(other, here_has).unwrap();
            }
            sending.await.unwrap();
        });
    }

    #[test]
    fn its_owner_does_not_wait_for_itself() {
        tokio_uring::start(async {
            let (here, there) = pair().await;
            let mut here = ResumableLink::over(here);
            drop(there);
            // Some may be written before the end is noticed.
            for number in 0..20 {
                here.send(&message(number)).await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            here.receive().await.unwrap_err();
            here.suspend();
            here.send(&message(20)).await.unwrap();

            let (one, other) = pair().await;
            here.resume(one, 0).unwrap();
            let mut there = ResumableLink::over(other);
            let mut came = Vec::new();
            while came.len() < 21 {
                came.push(number_of(&there.receive().await.unwrap()));
            }
            assert_eq!(came, Vec::from_iter(0..21));
        });
    }

    #[test]
    fn senders_wait_while_it_is_suspended_and_fail_when_it_ends() {
        tokio_uring::start(async {
            let (here, _there) = pair().await;
            let mut here = ResumableLink::over(here);
            let sender = Rc::new(here.sender());
            here.suspend();
            let sending = {
                let sender = sender.clone();
                task::spawn("sender", async move { sender.send(&message(1)).await })
            };
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(!sending.is_finished() && here.is_suspended());
            drop(here);
            assert!(matches!(sending.await.unwrap(), Err(LinkError::Closed)));
            assert!(matches!(sender.send(&message(2)).await, Err(LinkError::Closed)));
        });
    }
}
