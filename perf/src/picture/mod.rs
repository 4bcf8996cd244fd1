//! Pictures: SVG drawn by hand, for a page or for itself.
//!
//! A [`Panel`] joins two [`Scale`]s and draws axes and marks into an [`Svg`]. Colours and type are classes of the style
//! sheet [`style::PICTURE`], for light and dark surroundings.

mod panel;
mod scale;
pub(crate) mod style;
mod svg;
mod unit;

pub(crate) use panel::{GUTTER, LINE, Panel, spread, width_of};
pub(crate) use scale::Scale;
pub(crate) use svg::{Anchor, Escaped, Svg};
pub(crate) use unit::{Unit, digits};

/// The width of pictures.
pub(crate) const WIDTH: f64 = 960.0;

/// A finished picture.
#[derive(Debug, Clone)]
pub(crate) struct Picture {
    svg: Svg,
    height: f64,
    tells: String,
}

impl Picture {
    /// Makes a picture of this height. `tells` says in words what it shows, for readers who cannot see it.
    pub(crate) fn new(svg: Svg, height: f64, tells: impl Into<String>) -> Self {
        Self { svg, height, tells: tells.into() }
    }

    /// Returns the picture as a part of a page that has the style sheet.
    pub(crate) fn inline(&self) -> String {
        self.svg.picture((WIDTH, self.height), &self.tells, "")
    }

    /// Returns the picture as the text of a file.
    pub(crate) fn file(&self) -> String {
        self.svg.picture((WIDTH, self.height), &self.tells, style::PICTURE)
    }
}
