"""Chat templates in the ways that they are written, and what transformers 5.23 makes of MESSAGES with each.

The texts were made by its render_jinja_template([MESSAGES], add_generation_prompt=True) with bos_token "<s>" and
eos_token "</s>", and are not made again by the code under test.
"""

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Grüße <&> 'x' "},
            {"role": "assistant", "content": "日本\n"}, {"role": "user", "content": "And?"}]

CHATML = """{% for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

INST = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
    {% set system = messages[0]['content'] | trim + '\\n\\n' %}
{% else %}
    {% set rest = messages %}
    {% set system = '' %}
{% endif %}
{% for m in rest %}
    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if m.role == 'user' %}
{{ '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}
    {% elif m.role == 'assistant' %}
{% generation %}{{ ' ' + m.content | trim + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""

TOOLS = """{%- set ns = namespace(count=0, seen=[]) -%}
{%- for m in messages -%}
  {%- if m.role == 'system' %}{% continue %}{% endif -%}
  {%- set ns.count = ns.count + 1 -%}
  {%- if ns.count > 2 %}{% break %}{% endif -%}
  <{{ ns.count }}>{{ m | tojson }}{{ dict(a=1)['a'] }}
{% endfor -%}
{{ messages | map(attribute='role') | join(',') }}{{ tools is none }}{{ '%d' % 3 }}{{ strftime_now('%%') }}
"""

TEMPLATES = {"chatml": CHATML, "inst": INST, "tools": TOOLS}
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Grüße <&> 'x' <|im_end|>\n"
              "<|im_start|>assistant\n日本\n<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
    "inst": "<s>\n[INST] Be brief.\n\nGrüße <&> 'x' [/INST]\n 日本</s>[INST] And? [/INST]\n",
    "tools": '<1>{"role": "user", "content": " Grüße <&> \'x\' "}1\n'
             '<2>{"role": "assistant", "content": "日本\\n"}1\nsystem,user,assistant,userTrue3%',
}
