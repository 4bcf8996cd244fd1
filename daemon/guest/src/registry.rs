//! This module lists the guests that are here.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::rc::{Rc, Weak};

use memlane_net::journal::VmmIdentity;
use memlane_net::log_limiter::LogLimiter;
use memlane_net::task;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::RunState;
use tracing::{info, warn};

use crate::guest::Guest;

/// A VMM that attaches is not the one that a migration waits for, though it claims to be or is in that one's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stranger {
    /// The VMM runs a guest of another name.
    #[error("it has another guest")]
    Guest,
    /// The VMM is another process than the one that the migration knows.
    #[error("it is another process")]
    Process,
    /// The shape of the VMM's guest is another one.
    #[error("its guest is made of something else")]
    Shape,
    /// The VMM is in a state that the migration has not brought it to.
    #[error("it was not told to do what it says that it does")]
    RunState,
    /// The VMM says that it takes part in another migration.
    #[error("it waits for word of another migration")]
    Migration,
}

/// A VMM was sent away when it attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// Another VMM has attached a guest of this name.
    #[error("a guest of this name is here already")]
    NameTaken,
    /// A migration waits for another VMM.
    #[error(transparent)]
    Stranger(#[from] Stranger),
}

/// An observer is asked about each VMM that attaches. The engine, which runs the migrations, is one.
pub trait GuestObserver {
    /// Judges a VMM that attaches, before it is listed.
    ///
    /// # Errors
    ///
    /// Fails if it is not the VMM that a migration waits for, though it claims to be, or is in that one's place.
    fn expects(&self, guest: &Guest) -> Result<(), Stranger>;

    /// Takes note of a guest that has just been listed. A migration that waits for it claims it now, before any order
    /// can.
    fn attached(&self, guest: &Rc<Guest>);

    /// Tells whether a migration under way works with this process.
    fn works_with(&self, vmm: VmmIdentity) -> bool;
}

/// Lists the guests that are here, by name.
#[derive(Default)]
pub struct Guests {
    guests: RefCell<BTreeMap<Label, Rc<Guest>>>,
    /// These guests can never be whole, and their VMMs could not be ended.
    lost: RefCell<HashSet<(Label, VmmIdentity)>>,
    /// This limits what is logged of VMMs that were sent away.
    strangers: RefCell<LogLimiter<(Label, u32)>>,
    observer: RefCell<Option<Weak<dyn GuestObserver>>>,
}

impl Guests {
    /// Has `observer` asked about each VMM that attaches from now on.
    pub fn observe(&self, observer: Weak<dyn GuestObserver>) {
        self.observer.replace(Some(observer));
    }

    /// Returns the guest of this name.
    pub fn get(&self, name: &Label) -> Option<Rc<Guest>> {
        self.guests.borrow().get(name).cloned()
    }

    /// Returns all guests, sorted by name.
    pub fn all(&self) -> Vec<Rc<Guest>> {
        self.guests.borrow().values().cloned().collect()
    }

    /// Returns how many guests there are.
    pub fn count(&self) -> usize {
        self.guests.borrow().len()
    }

    /// Lists a guest whose VMM has attached, until its connection ends.
    ///
    /// # Errors
    ///
    /// Fails if the VMM was sent away, because the name is taken or a migration waits for another VMM.
    pub fn attach(self: &Rc<Self>, guest: Rc<Guest>) -> Result<(), AttachError> {
        let name = guest.shape.name.clone();
        if self.get(&name).is_some() {
            warn!(guest = %name, "two VMMs came with one name; the second is sent away");
            guest.driver.hang_up();
            return Err(AttachError::NameTaken);
        }
        let observer = self.observer();
        if let Some(Err(why)) = observer.as_ref().map(|observer| observer.expects(&guest)) {
            let pid = guest.process.identity().pid;
            if let Some(left_out) = self.strangers.borrow_mut().say((name.clone(), pid)) {
                let what = "a VMM is not the one that a migration waits for; it is sent away";
                warn!(guest = %name, pid, %why, left_out, "{what}");
            }
            guest.driver.hang_up();
            return Err(why.into());
        }
        let key = (name.clone(), guest.process.identity());
        if guest.run_state.get() == RunState::Incoming {
            // The process waits for another guest of this name.
            self.lost.borrow_mut().remove(&key);
        }
        guest.lost.set(self.lost.borrow().contains(&key));
        self.guests.borrow_mut().insert(name, guest.clone());
        guest.prefault();
        task::spawn("watch of a VMM", self.clone().watch(guest.clone()));
        if let Some(observer) = observer {
            observer.attached(&guest);
        }
        Ok(())
    }

    /// Notes that a guest can never be whole, and that its VMM could not be ended: it is no guest that runs.
    pub fn note_lost(&self, name: &Label, vmm: VmmIdentity) {
        self.lost.borrow_mut().insert((name.clone(), vmm));
        if let Some(guest) = self.get(name).filter(|guest| guest.process.identity() == vmm) {
            guest.lost.set(true);
        }
    }

    /// Tells whether a migration under way works with this process.
    pub(crate) fn work_with(&self, vmm: VmmIdentity) -> bool {
        self.observer().is_some_and(|observer| observer.works_with(vmm))
    }

    fn observer(&self) -> Option<Rc<dyn GuestObserver>> {
        self.observer.borrow().as_ref().and_then(Weak::upgrade)
    }

    /// Takes a guest off the list when the connection to its VMM has ended.
    async fn watch(self: Rc<Self>, guest: Rc<Guest>) {
        guest.driver.gone().await;
        let name = &guest.shape.name;
        info!(guest = %name, pid = guest.process.identity().pid, "a VMM is gone");
        let mut guests = self.guests.borrow_mut();
        if guests.get(name).is_some_and(|other| Rc::ptr_eq(other, &guest)) {
            guests.remove(name);
        }
    }
}
