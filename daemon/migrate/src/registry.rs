//! This module lists the migrations of this host: those under way, and those that ended lately.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;

use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::MigrationId;

use crate::handle::MigrationHandle;

/// This many migrations are remembered after their end.
const REMEMBERED: usize = 100;

/// Lists the migrations of this host, the oldest first.
#[derive(Default)]
pub struct Migrations {
    migrations: RefCell<Vec<Rc<MigrationHandle>>>,
    /// These migrations are being offered to this host.
    offered: Rc<RefCell<HashSet<MigrationId>>>,
}

/// An offer that is being looked at.
pub(crate) struct Offered {
    offered: Rc<RefCell<HashSet<MigrationId>>>,
    id: MigrationId,
}

impl Migrations {
    /// Remembers a migration.
    pub fn add(&self, handle: Rc<MigrationHandle>) {
        let mut migrations = self.migrations.borrow_mut();
        // One that is over may still be worked on: its VMM is to be discarded, or the other host to hear of the end.
        let ended = |handle: &Rc<MigrationHandle>| handle.is_over() && !handle.is_live();
        let over = migrations.iter().filter(|handle| ended(handle)).count();
        if over >= REMEMBERED
            && let Some(oldest) = migrations.iter().position(ended)
        {
            migrations.remove(oldest);
        }
        migrations.push(handle);
    }

    /// Returns all migrations, the oldest first.
    pub fn all(&self) -> Vec<Rc<MigrationHandle>> {
        self.migrations.borrow().clone()
    }

    /// Returns the migration with this identity.
    pub fn get(&self, id: &MigrationId) -> Option<Rc<MigrationHandle>> {
        self.migrations.borrow().iter().rev().find(|handle| handle.id == *id).cloned()
    }

    /// Returns the migration with this identity, if it is one with this peer.
    pub fn with(&self, peer: &Label, id: &MigrationId) -> Option<Rc<MigrationHandle>> {
        let is = |handle: &&Rc<MigrationHandle>| handle.id == *id && handle.peer == *peer;
        self.migrations.borrow().iter().rev().find(is).cloned()
    }

    /// Returns how many migrations are under way.
    pub fn active(&self) -> usize {
        self.migrations.borrow().iter().filter(|handle| !handle.is_over()).count()
    }

    /// Takes note of an offer, until the returned value is dropped. Returns `None` if the migration is known already.
    pub(crate) fn take_offer(&self, id: MigrationId) -> Option<Offered> {
        let fresh = self.get(&id).is_none() && self.offered.borrow_mut().insert(id);
        fresh.then(|| Offered { offered: self.offered.clone(), id })
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        self.offered.borrow_mut().remove(&self.id);
    }
}
