"""A finished student in a form to ship, and back.

student      a finished run -> its student, its held-out images, and what a file says of it
bits         codes in bits;  levels: quantized weights as codes;  packed: the packed file, and its format
loading      a student's file -> a plain network
checking     whether a file gives what its student gives
writing      write a form, run it, and only then give it its name
latency      what an ONNX file takes, in bytes and seconds, beside its teacher in full precision
"""

from dcq_ray.export.loading import load_packed
from dcq_ray.export.student import Student, finished_report, open_student
from dcq_ray.export.writing import Exported, Form, export_student

__all__ = ["Exported", "Form", "Student", "export_student", "finished_report", "load_packed", "open_student"]
