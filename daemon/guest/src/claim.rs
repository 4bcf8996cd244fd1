//! A guest takes part in one migration at a time, which holds a [`Claim`] on it.

use std::ops::Deref;
use std::rc::Rc;

use memlane_protocol::wire::attach::MigrationId;

use crate::guest::Guest;

/// A guest that takes part in one migration, and in no other until this is dropped.
pub struct Claim {
    guest: Rc<Guest>,
    migration: MigrationId,
}

impl Guest {
    /// Has the guest take part in a migration. Returns `None` if it takes part in another.
    pub fn claim(self: &Rc<Self>, migration: MigrationId) -> Option<Claim> {
        let before = self.migration.get();
        if before.is_some_and(|before| before != migration) {
            return None;
        }
        self.migration.set(Some(migration));
        Some(Claim { guest: self.clone(), migration })
    }

    /// Returns the migration that the guest takes part in.
    pub fn migration(&self) -> Option<MigrationId> {
        self.migration.get()
    }
}

impl Claim {
    /// Returns the guest.
    pub fn guest(&self) -> &Rc<Guest> {
        &self.guest
    }
}

impl Deref for Claim {
    type Target = Rc<Guest>;

    fn deref(&self) -> &Rc<Guest> {
        &self.guest
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.guest.migration.get() == Some(self.migration) {
            self.guest.migration.set(None);
        }
    }
}
