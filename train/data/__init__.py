"""The data of a training run."""

from train.data.annotations import AnnotationFile as AnnotationFile
