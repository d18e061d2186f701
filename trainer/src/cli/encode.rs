//! The command `trainer encode`.

use std::path::{Path, PathBuf};

use crate::comm::World;
use crate::config::Dtype;
use crate::data::reader;
use crate::eval::embed::{DEFAULT_CHUNK_TOKENS, LoadedModel, Role};
use crate::model::Options;
use crate::system::npy::Writer;
use crate::{Error, Result, config};

/// Embed texts and write the embeddings to a NumPy file
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    trainer encode --model runs/quickstart/model --input questions.txt --output questions.npy --role query\n  \
    trainer encode --model sentence-transformers/all-MiniLM-L6-v2 --input docs.jsonl --output docs.npy")]
pub(super) struct Args {
    /// Model folder, or id of a model on the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Texts: a .jsonl, .csv, .tsv or .parquet file with a column `text`, or another file with one text per
    /// line; each also .gz or .zst
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// File to write: float32, one row per text, in the order of the input
    #[arg(long, value_name = "FILE.npy")]
    output: PathBuf,
    /// Role of the texts, which selects one of the model's prompts. Default: none, the model's default prompt is used
    #[arg(long)]
    role: Option<Role>,
    /// Text put before each text, instead of the model's prompt
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Maximum number of tokens encoded at once
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CHUNK_TOKENS, value_parser = at_least_one)]
    chunk_tokens: usize,
    /// Truncate texts to this number of tokens, with prompt and special tokens. Default: what the model folder says
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_length: Option<usize>,
    /// Data type of matrix products and activations
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// Use random weights instead of the model's (for tests and to measure speed)
    #[arg(long)]
    random_weights: bool,
}

/// Number of texts in memory at once. They are sorted by length, so that chunks hold texts of similar length.
const PORTION: usize = 1 << 15;

pub(super) fn run(args: &Args, world: &World) -> Result<()> {
    // An error in the last line is found before hours are spent on the first.
    let mut count = 0;
    texts(&args.input, |_| {
        count += 1;
        Ok(())
    })?;
    if count == 0 {
        return Err(Error::file(&args.input, "has no texts"));
    }
    let mut options = options(args.random_weights, args.max_length);
    options.model.dtype = args.dtype;
    let opened = LoadedModel::open(&args.model, &options)?;
    let mut embedder = opened.embedder();
    embedder.set_max_length(args.max_length)?;
    embedder.chunk_tokens = args.chunk_tokens;
    embedder.world = world.clone();
    let role = match (&args.prompt, args.role) {
        // A prompt of the user's own goes where a query's stands.
        (Some(prompt), _) => {
            embedder.query_prompt = prompt;
            Role::Query
        }
        (None, role) => role.unwrap_or(Role::Text),
    };

    let mut npy = match world.is_rank_zero() {
        true => Some(Writer::create(&args.output, count, opened.model.embedding_dim())?),
        false => None,
    };
    let mut progress = embedder.progress(role.plural(), count);
    let mut encode = |portion: &[String]| {
        let embeddings = embedder.encode_with_progress(portion, role, &mut progress)?;
        npy.as_mut().map_or(Ok(()), |npy| npy.write(&embeddings))
    };
    let mut portion = Vec::with_capacity(count.min(PORTION));
    texts(&args.input, |text| {
        portion.push(text);
        if portion.len() == PORTION {
            encode(&portion)?;
            portion.clear();
        }
        Ok(())
    })?;
    if !portion.is_empty() {
        encode(&portion)?;
    }
    let Some(npy) = npy else { return Ok(()) };
    npy.finish()?;
    tracing::info!("{count} × {} in {}", opened.model.embedding_dim(), args.output.display());
    Ok(())
}

/// Options to open a model for inference. Its tables of positions go as far as `max_length`, by default as far as its folder says.
pub(super) fn options(random_weights: bool, max_length: Option<usize>) -> Options<'static> {
    let init = if random_weights { config::WeightInit::Random } else { config::WeightInit::Pretrained };
    let (max_query_length, max_document_length) = (max_length, max_length);
    let model = config::Model { init, max_query_length, max_document_length, ..config::Model::default() };
    Options { model, ..Options::default() }
}

/// A parser for clap: a whole number above 0.
pub(super) fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "expected a whole number above 0".to_owned())
}

/// Calls `each` with the texts of `input` in order.
fn texts(input: &Path, mut each: impl FnMut(String) -> Result<()>) -> Result<()> {
    if reader::Format::of(input).is_some() {
        return reader::objects(input, |line, row| {
            let text = reader::text_of(&row);
            each(text.map_err(|message| Error::Row { path: input.to_owned(), line, message })?.to_owned())
        });
    }
    let mut before = 0;
    reader::lines(input, |line, text| {
        if line != before + 1 {
            // Skipping the line would shift every later row of the embeddings.
            let message = "is blank, expected one text per line".into();
            return Err(Error::Row { path: input.to_owned(), line: before + 1, message });
        }
        before = line;
        each(text.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn all(name: &str, text: &str) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        let mut seen = Vec::new();
        texts(&path, |text| {
            seen.push(text);
            Ok(())
        })?;
        Ok(seen)
    }

    #[test]
    fn a_longer_max_length_than_the_folders_has_its_positions() {
        for family in ["mistral", "modernbert"] {
            let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family);
            let place = tempfile::tempdir().unwrap();
            fs::create_dir(place.path().join("1_Pooling")).unwrap();
            for name in [
                "config.json",
                "modules.json",
                "1_Pooling/config.json",
                "tokenizer.json",
                "model.safetensors",
            ] {
                fs::copy(golden.join(name), place.path().join(name)).unwrap();
            }
            fs::write(place.path().join("sentence_bert_config.json"), r#"{"max_seq_length": 8}"#).unwrap();
            let embedding = |length: Option<usize>| {
                let opened = LoadedModel::open(place.path().to_str().unwrap(), &options(false, length))?;
                let mut embedder = opened.embedder();
                embedder.set_max_length(length)?;
                Ok::<_, Error>(
                    embedder.encode(&["a b c d e f g h i j k l m n"], Role::Text)?.to_vec2::<f32>()?,
                )
            };
            assert_ne!(embedding(None).unwrap(), embedding(Some(64)).unwrap());
            assert_ne!(embedding(None).unwrap(), embedding(Some(4)).unwrap());
            let error = embedding(Some(65)).unwrap_err().to_string();
            assert!(error.contains("has 64 positions"), "{error}");
        }
    }

    #[test]
    fn texts_are_lines_or_the_text_of_objects() {
        assert_eq!(all("a.txt", "one \ntwo, {\"x\"}\n").unwrap(), ["one", "two, {\"x\"}"]);
        assert_eq!(all("a", "ü").unwrap(), ["ü"]);
        assert_eq!(
            all("a.jsonl", "{\"text\": \" x \", \"id\": 1}\n\n{\"text\": \"\"}").unwrap(),
            [" x ", ""]
        );
        for (name, text, expected) in [
            ("a.txt", "a\n\nb\n", "a.txt:2: is blank"),
            ("a.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n", "a.jsonl:2: has no `text`"),
            ("a.jsonl", "{\"text\": 1}\n", "a.jsonl:1: `text` is the number 1, expected a text"),
        ] {
            let error = all(name, text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
