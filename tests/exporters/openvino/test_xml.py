from bitscape.exporters.openvino.xml import compact

GRAPH = b"""<?xml version="1.0"?>
<net name="n" version="11">
  <layers>
    <layer id="0" name="x" type="Parameter" version="opset1">
      <data shape="?,3" element_type="f32" />
      <output><port id="0" precision="FP32" names="images"><dim>-1</dim><dim>3</dim></port></output>
    </layer>
    <layer id="1" name="a &gt;/&gt;" type="Add" version="opset1">
      <data auto_broadcast="numpy" />
      <input><port id="0" precision="FP32"><dim>-1</dim></port><port id="1" precision="FP32"><dim>-1</dim></port></input>
      <output><port id="2" precision="FP32" names="inner"><dim>-1</dim></port></output>
    </layer>
    <layer id="2" name="m" type="Multiply" version="opset1">
      <data auto_broadcast="none" />
      <input><port id="0" precision="FP32" /><port id="1" precision="FP32" /></input>
      <output><port id="2" precision="FP32" names="scores"><dim>-1</dim></port></output>
    </layer>
    <layer id="3" name="r" type="Result" version="opset1"><input><port id="0" precision="FP32"><dim>-1</dim></port></input></layer>
  </layers>
  <edges>
    <edge from-layer="0" from-port="0" to-layer="1" to-port="0" />
    <edge from-layer="2" from-port="2" to-layer="3" to-port="0" />
  </edges>
</net>
"""
EXPECTED = (
    b'<?xml version="1.0"?><net name="n" version="11"><layers>'
    b'<layer id="0" name="x" type="Parameter" version="opset1"><data shape="?,3" element_type="f32"/>'
    b'<output><port id="0" precision="FP32" names="images"/></output></layer>'
    b'<layer id="1" name="a &gt;/&gt;" type="Add" version="opset1"><input><port id="0"/><port id="1"/></input>'
    b'<output><port id="2" precision="FP32"/></output></layer>'
    b'<layer id="2" name="m" type="Multiply" version="opset1"><data auto_broadcast="none"/><input><port id="0"/><port id="1"/></input>'
    b'<output><port id="2" precision="FP32" names="scores"/></output></layer>'
    b'<layer id="3" name="r" type="Result" version="opset1"><input><port id="0"/></input></layer></layers>'
    b'<edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>'
    b'<edge from-layer="2" from-port="2" to-layer="3" to-port="0"/></edges></net>'
)


def test_only_what_openvino_infers_is_left_out():
    assert compact(GRAPH) == EXPECTED


def test_a_compact_graph_stays_as_it_is():
    assert compact(EXPECTED) == EXPECTED
