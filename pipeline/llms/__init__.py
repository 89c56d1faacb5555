"""llms"""
