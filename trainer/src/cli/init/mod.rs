//! `trainer init`: looks at data files and writes a configuration that trains on them.

mod hold_out;
mod yaml;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use self::hold_out::HeldOut;
use super::print;
use crate::config::{ColumnNames, Columns, DataSet, EvaluationKind, RowKind};
use crate::data::reader::beir::{self, Split};
use crate::data::reader::{self, DATA_FILE, Source};
use crate::data::recognise::Profile;
use crate::system::atomic::StagedDir;
use crate::{Error, Result, hub};

/// Look at your data and write a configuration that trains on them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer init questions.csv\n  \
    trainer init data/faq.jsonl.gz data/manuals.parquet --model intfloat/multilingual-e5-small --output manuals.yaml\n  \
    trainer init table.csv --columns query=Frage,positive=Antwort\n\n\
    Recognises pairs (query, positive), triplets (also negatives), labelled texts (text, label) and scored pairs \
    (sentence1, sentence2, score). A tenth of the rows, at most 1,000, is held out to measure the model \
    before and after training, and none of its texts is trained on. If DATA has a BEIR folder with a test or \
    dev split, that split is used instead.\n\n\
    Prints the configuration's path and the commands that come next. Existing files are never overwritten.")]
pub(super) struct Args {
    #[arg(required = true, value_name = "DATA", help = format!("A {DATA_FILE} or a BEIR folder, one or several"))]
    data: Vec<PathBuf>,
    /// The model to train: a folder, or an id on the Hugging Face hub
    #[arg(long, value_name = "MODEL", default_value = "sentence-transformers/all-MiniLM-L6-v2")]
    model: String,
    /// The configuration to write. Default: in the current directory, faq.yaml if the first DATA is faq.csv
    #[arg(long, value_name = "CONFIG")]
    output: Option<PathBuf>,
    /// The column of each part of a row, such as query=Frage,positive=Antwort. Default: by the columns' names
    /// and content
    #[arg(long, value_name = "PART=NAME", value_delimiter = ',')]
    columns: Vec<String>,
}

/// A data set to train on.
struct TrainingSet {
    set: DataSet,
    source: Source,
    /// How the kind and the columns of its rows were recognised.
    reason: String,
}

/// A set to evaluate on.
struct Evaluation {
    name: String,
    path: PathBuf,
    kind: EvaluationKind,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let columns = parse_columns(&args.columns)?;
    let config =
        args.output.clone().unwrap_or_else(|| PathBuf::from(format!("{}.yaml", name_of(&args.data[0]))));
    let name = config.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    if config.symlink_metadata().is_ok() {
        return Err(Error::file(&config, "already exists: delete it, or choose another --output"));
    }
    let folder = Path::new("data").join(&name);
    let (training, mut evaluation) = recognise(&args.data, &columns)?;
    for TrainingSet { set, source, reason } in &training {
        tracing::info!(
            "{}: {} rows of {} ({reason})",
            set.path.display(),
            source.len(),
            in_words(set, source)
        );
    }

    // Whatever can fail comes before the first file is written.
    let lengths = yaml::Lengths::measure(&training, &args.model)?;
    let held_out = match evaluation.is_empty() {
        true => HeldOut::choose(&training)?,
        false => None,
    };
    let mut trained: Vec<DataSet> = training.iter().map(|training| training.set.clone()).collect();
    let mut rows: Vec<u64> = training.iter().map(|training| training.source.len()).collect();
    if let Some(held_out) = &held_out {
        if StagedDir::check_free(&folder).is_err() {
            let message = "already exists; the rows to train on and to measure with would be written there\n\
                           hint: choose another name with --output NAME.yaml, or delete it";
            return Err(Error::file(folder, message));
        }
        let draft = StagedDir::new(&folder)?;
        for (number, training) in training.iter().enumerate() {
            let part = held_out.write(number, training, &draft)?;
            tracing::info!(
                "{}: held out {} of {} rows to measure the model",
                training.set.path.display(),
                rows[number] - part.trained,
                rows[number]
            );
            rows[number] = part.trained;
            trained[number].path = folder.join(part.file);
            if training.set.path.is_dir() {
                trained[number].columns = Columns::default();
            }
            evaluation.extend(part.evaluation.map(|(file, kind)| {
                let path = folder.join(file);
                Evaluation { name: reader::stem(&path), path, kind }
            }));
        }
        draft.commit()?;
    }

    let recipe = yaml::Recipe {
        name: &name,
        config: &config,
        model: &args.model,
        lengths,
        trained: &trained,
        rows: rows.iter().sum(),
        evaluation: &evaluation,
    };
    if let Some(parent) = config.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(Error::write("create", parent))?;
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&config)
        .and_then(|mut file| file.write_all(recipe.text().as_bytes()))
        .map_err(Error::write("write", &config))?;
    if args.columns.is_empty() && training.iter().any(|training| training.set.columns != Columns::default()) {
        tracing::info!(
            "if other columns are meant, delete {} and {}, and add --columns query=NAME,positive=NAME",
            config.display(),
            folder.display()
        );
    }
    print(config.display());
    recipe.commands().iter().for_each(print);
    Ok(())
}

/// Opens all data; BEIR folders may be for training, for evaluation or for both.
fn recognise(data: &[PathBuf], columns: &Columns) -> Result<(Vec<TrainingSet>, Vec<Evaluation>)> {
    let (mut training, mut evaluation): (Vec<TrainingSet>, Vec<Evaluation>) = (Vec::new(), Vec::new());
    for path in data {
        let path = hub::data_file(path)?;
        let mut name = name_of(&path);
        if training.iter().any(|other| other.set.name == name) {
            name = format!("{name}-{}", training.len() + 1);
        }
        if !path.is_dir() {
            training.push(open_file(name, path, columns)?);
            continue;
        }
        let splits = beir::splits(&path);
        let has = |split: &str| splits.iter().any(|name| name == split);
        if has("test") || has("dev") {
            tracing::info!("{}: a BEIR folder to measure the model on", path.display());
            evaluation.push(Evaluation {
                name: name.clone(),
                path: path.clone(),
                kind: EvaluationKind::Retrieval,
            });
        }
        if has("train") || evaluation.last().is_none_or(|set| set.path != path) {
            let qrels = beir::qrels(&path, Split::Train)?;
            let set = DataSet { name, path, kind: Some(RowKind::Pairs), ..DataSet::default() };
            let source = Source::open(&set)?;
            training.push(TrainingSet { set, source, reason: format!("a BEIR folder, {}", name_of(&qrels)) });
        }
    }
    if training.is_empty() {
        let message =
            "has nothing to train on\nhint: also name a data file, or a BEIR folder with qrels/train.tsv";
        return Err(Error::file(&data[0], message));
    }
    Ok((training, evaluation))
}

fn open_file(name: String, path: PathBuf, columns: &Columns) -> Result<TrainingSet> {
    let recognised = Profile::read(&path)?.recognise(columns);
    let recognised = recognised.map_err(|message| Error::file(&path, message))?;
    let kind = Some(recognised.kind);
    let set = DataSet { name, path, columns: recognised.columns, kind, ..DataSet::default() };
    let source = Source::open(&set)?;
    Ok(TrainingSet { set, source, reason: recognised.reason })
}

/// The name of a folder, or of a file without its endings.
fn name_of(path: &Path) -> String {
    match path.canonicalize() {
        Ok(folder) if folder.is_dir() => {
            folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
        }
        _ => reader::stem(path),
    }
}

/// `pairs of Frage and Antwort`.
fn in_words(set: &DataSet, source: &Source) -> String {
    let columns = &set.columns;
    let kind = match source.kind() {
        RowKind::Pairs | RowKind::Triplets if source.negatives() => "query, positive and negatives",
        RowKind::Pairs | RowKind::Triplets => "query and positive",
        RowKind::Labelled => "text and label",
        RowKind::Similarity => "two texts and their score",
    };
    let first = columns.query.as_ref().or(columns.text.as_ref()).or(columns.sentence1.as_ref());
    let positive = columns.positive.as_ref().and_then(|names| names.0.first());
    let second = positive.or(columns.label.as_ref()).or(columns.sentence2.as_ref());
    match first.zip(second) {
        Some((first, second)) => format!("{kind}: columns `{first}` and `{second}`"),
        None => kind.to_owned(),
    }
}

/// `query=Frage,positive=Antwort`.
fn parse_columns(given: &[String]) -> Result<Columns> {
    let mut columns = Columns::default();
    for argument in given {
        let wrong = || {
            let parts = "query, positive, negatives, text, label, sentence1, sentence2 or score";
            Error::Usage(format!("--columns: found `{argument}`, expected PART=NAME, PART being {parts}"))
        };
        let (part, name) = argument.split_once('=').ok_or_else(wrong)?;
        let name = name.to_owned();
        let several =
            |names: &mut Option<ColumnNames>, name| names.get_or_insert(ColumnNames(Vec::new())).0.push(name);
        match part {
            "query" => columns.query = Some(name),
            "positive" => several(&mut columns.positive, name),
            "negatives" | "negative" => several(&mut columns.negatives, name),
            "text" => columns.text = Some(name),
            "label" => columns.label = Some(name),
            "sentence1" => columns.sentence1 = Some(name),
            "sentence2" => columns.sentence2 = Some(name),
            "score" => columns.score = Some(name),
            _ => return Err(wrong()),
        }
    }
    Ok(columns)
}
