//! Options of formats: the `-o` of `create` and `convert`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use sapwood_image::Format;

use super::size::Size;

/// The options that `-o` gave, as `name=value,name=value`.
#[derive(Clone, Debug, Default)]
pub struct FormatOptions {
    /// `size`.
    pub size: Option<u64>,
    /// `backing_file`.
    pub backing_file: Option<PathBuf>,
    /// `backing_fmt`.
    pub backing_format: Option<Format>,
    /// `segment_size`.
    pub segment_size: Option<u32>,
    /// `preallocation` is `falloc`.
    pub allocate: bool,
}

impl FormatOptions {
    /// Reads the options of `format`.
    pub fn parse(texts: &[String], format: Format) -> anyhow::Result<Self> {
        let mut options = Self::default();
        for item in texts.iter().flat_map(|text| text.split(',')) {
            let (name, value) =
                item.split_once('=').with_context(|| format!("-o {item}: write NAME=VALUE"))?;
            options.set(name, value, format).with_context(|| format!("-o {item}"))?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str, format: Format) -> anyhow::Result<()> {
        let bytes = || value.parse().map(|Size(n)| n).map_err(anyhow::Error::msg);
        match (format, name, value) {
            (_, "size", _) => self.size = Some(bytes()?),
            (Format::Layer, "segment_size", _) => {
                self.segment_size = Some(u32::try_from(bytes()?).context("too large")?);
            }
            (Format::Layer, "backing_file", _) => self.backing_file = Some(value.into()),
            (Format::Layer, "backing_fmt", _) => self.backing_format = Some(value.parse()?),
            (Format::Raw, "preallocation", "off") => self.allocate = false,
            (Format::Raw, "preallocation", "falloc") => self.allocate = true,
            (Format::Raw, "preallocation", _) => bail!("preallocation is off or falloc"),
            (Format::Layer, ..) => {
                bail!("a layer has the options size, backing_file, backing_fmt, segment_size")
            }
            (Format::Qcow2 | Format::Sealed, ..) => bail!("{format} images are read, not made"),
            (Format::Raw, ..) => bail!("a raw disk has the options size, preallocation"),
        }
        Ok(())
    }
}
