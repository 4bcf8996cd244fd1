//! [`ForeignRam`]: a guest's memory as it lies in another process.

use std::ops::Range;
use std::sync::Arc;

use memlane_protocol::PAGE_SIZE;

use crate::ram::GuestRam;

/// What one page table of small pages maps.
const TABLE_BYTES: u64 = 2 << 20;

/// Where each region of a guest's memory lies in the process that runs the guest: what a userfaultfd
/// of that process, and its `pagemap`, are told addresses in.
#[derive(Debug)]
pub struct ForeignRam {
    ram: Arc<GuestRam>,
    places: Vec<Place>,
}

/// Where a region lies.
#[derive(Debug)]
pub(crate) struct Place {
    pages: Range<u64>,
    /// Of its first byte in the other process.
    address: u64,
    /// 4 KiB pages in a page of the region's own size.
    unit: u64,
}

impl ForeignRam {
    /// `addresses` are those of each region's first byte; `None` where no region can lie there.
    pub fn new(ram: Arc<GuestRam>, addresses: &[u64]) -> Option<Self> {
        if addresses.len() != ram.regions().len() {
            return None;
        }
        let regions = ram.pieces(0..ram.pages()).zip(ram.regions()).zip(addresses);
        let places = regions.map(|(((_, pages), region), &address)| {
            address.checked_add(region.bytes)?;
            let fits = address.is_multiple_of(region.page_bytes.into());
            fits.then_some(Place { pages, address, unit: u64::from(region.page_bytes) / PAGE_SIZE })
        });
        let places = places.collect::<Option<_>>()?;
        Some(Self { ram, places })
    }

    /// The same memory in this process.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Where `pages` lie, region by region: addresses, and the pages that lie there.
    pub fn pieces(&self, pages: Range<u64>) -> impl Iterator<Item = (Range<u64>, Range<u64>)> + '_ {
        let pieces = self.ram.pieces(pages);
        pieces.map(|(index, piece)| (self.places[index].addresses(&piece), piece))
    }

    /// The page that an address lies in.
    pub fn page_at(&self, address: u64) -> Option<u64> {
        self.places.iter().find_map(|place| place.page_at(address))
    }

    /// 4 KiB pages in the page of its region's own size that `page` lies in: 1 or 512.
    pub fn unit_of(&self, page: u64) -> u64 {
        self.place_of(page).map_or(1, |place| place.unit)
    }

    /// `pages`, grown to whole pages of the regions that they begin and end in.
    pub fn whole(&self, pages: Range<u64>) -> Range<u64> {
        self.ram.whole(pages)
    }

    /// The regions' places, in order.
    pub(crate) fn places(&self) -> &[Place] {
        &self.places
    }

    /// Where the region lies that `page` belongs to.
    fn place_of(&self, page: u64) -> Option<&Place> {
        self.ram.region_of(page).map(|index| &self.places[index])
    }
}

impl Place {
    /// The region's pages.
    pub(crate) fn all(&self) -> Range<u64> {
        self.pages.clone()
    }

    /// 4 KiB pages in a page of the region's own size.
    pub(crate) fn unit(&self) -> u64 {
        self.unit
    }

    /// Addresses of `pages` of this region in the other process.
    pub(crate) fn addresses(&self, pages: &Range<u64>) -> Range<u64> {
        let address = |page: u64| self.address + (page - self.pages.start) * PAGE_SIZE;
        address(pages.start)..address(pages.end)
    }

    /// The pages of this region that share a page table with `page` there.
    pub(crate) fn table_of(&self, page: u64) -> Range<u64> {
        let table = self.addresses(&(page..page + 1)).start / TABLE_BYTES * TABLE_BYTES;
        self.pages_at(&(table..table + TABLE_BYTES))
    }

    /// The pages at `addresses` there, as far as they belong to this region.
    pub(crate) fn pages_at(&self, addresses: &Range<u64>) -> Range<u64> {
        let page = |address: u64| {
            let page = self.pages.start + address.saturating_sub(self.address) / PAGE_SIZE;
            page.min(self.pages.end)
        };
        page(addresses.start)..page(addresses.end)
    }

    fn page_at(&self, address: u64) -> Option<u64> {
        let page = self.pages.start + address.checked_sub(self.address)? / PAGE_SIZE;
        (page < self.pages.end).then_some(page)
    }
}

#[cfg(test)]
mod tests {
    use memlane_lab::{HugePages, say_skipped};

    use super::*;
    use crate::ram::Backing;

    #[test]
    fn pages_are_found_by_address_and_addresses_by_page() {
        let layout = [(0, 0x3000), (16 << 20, 0x2000)];
        let ram = Arc::new(GuestRam::create(&layout, &Backing::Memfd).unwrap());
        // In another order than the guest sees them, and side by side.
        let foreign = ForeignRam::new(ram.clone(), &[0x7000_2000, 0x7000_0000]).unwrap();
        let pieces: Vec<_> = foreign.pieces(1..5).collect();
        assert_eq!(pieces, [(0x7000_3000..0x7000_5000, 1..3), (0x7000_0000..0x7000_2000, 3..5)]);
        assert_eq!(foreign.page_at(0x7000_1fff), Some(4));
        assert_eq!(foreign.page_at(0x7000_2000), Some(0));
        assert_eq!([0x6fff_ffff, 0x7000_5000].map(|address| foreign.page_at(address)), [None; 2]);
        assert_eq!(foreign.places()[1].pages_at(&(0x7000_1000..0x7000_3000)), 4..5);
        assert_eq!(foreign.places()[0].table_of(1), 0..3);
        assert_eq!((foreign.whole(1..4), foreign.whole(3..3), foreign.unit_of(4)), (1..4, 3..3, 1));
        for wrong in [&[0x7000_0000][..], &[0x7000_0001, 0], &[u64::MAX - 0xfff, 0]] {
            assert!(ForeignRam::new(ram.clone(), wrong).is_none());
        }
    }

    #[test]
    fn huge_pages_are_taken_whole() {
        let test = "finding 2 MiB pages in another process";
        let _pages = match HugePages::reserve(3) {
            Ok(pages) => pages,
            Err(error) => return say_skipped(test, &format!("{error:#}")),
        };
        let layout = [(0, 2 << 20), (16 << 20, 4 << 20)];
        let ram = match GuestRam::create(&layout, &Backing::HugeMemfd) {
            Ok(ram) => Arc::new(ram),
            Err(error) => return say_skipped(test, &error.to_string()),
        };
        assert!(ForeignRam::new(ram.clone(), &[0, 0x1000]).is_none());
        let foreign = ForeignRam::new(ram, &[8 << 20, 32 << 20]).unwrap();
        assert_eq!((foreign.whole(5..6), foreign.whole(511..1025)), (0..512, 0..1536));
        assert_eq!((foreign.unit_of(5), foreign.page_at(35 << 20)), (512, Some(512 + 768)));
    }
}
